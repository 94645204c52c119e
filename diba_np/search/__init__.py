"""How bits are found: the objective, closed-form diagonals, and the solvers."""
