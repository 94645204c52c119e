"""Every compiled function and nothing else: NumPy arrays in, NumPy arrays out, no checks.

The compilation cache is stamped by the file of the outer function alone. So each file is closed
under jitted calls, but for helpers that several compile in (``_barrier.py``, ``_flips.py``,
``_ir.py``, ``_lookup.py``, ``_permute.py``): whoever imports one carries a digest of it, renewed
with every edit of the helper; a test tells.

Parallel kernels (``*_par``) are leaves that only Python calls; each has a serial twin of another
name that gives the same bits. Twins and instruction sets are written out, not made by a factory:
the cache tells functions apart by name, line and code, not by ``parallel=``, and a closure over
compiled functions has another key in every process.
"""

from diba_np.environment import check_variables

check_variables()  # before Numba is imported, which fails on some without naming them
