"""Every compiled function and nothing else: NumPy arrays in, NumPy arrays out, no checks.

Each file is closed under jitted calls, because the compilation cache is stamped by the file of the
outer function. Parallel kernels (``*_par``) are leaves that only Python calls; each has a serial
twin of another name that gives the same bits. Twins and instruction sets are written out, not made
by a factory: the cache tells functions apart by name, line and code, not by ``parallel=``, and a
closure over compiled functions has another key in every process.
"""
