"""Every compiled function and nothing else: NumPy arrays in, NumPy arrays out, no checks.

The compilation cache is stamped by the file of the outer function alone: what several files
compile in is imported with its digest, under the rules of "Add a kernel" in ``contributing.md``.

Parallel kernels (``*_par``) are leaves that only Python calls; each has a serial twin of another
name that gives the same bits. The two are written out, not made by a factory: the cache tells
functions apart by name, line and code, not by ``parallel=``.
"""

from diba_np.environment import check_variables

check_variables()  # before Numba is imported, which fails on some without naming them
