"""One file for each kind of network: `KIND`, its settings and tensors mapped by two tables."""
