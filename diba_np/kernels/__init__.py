"""Every compiled function and nothing else: NumPy arrays in, NumPy arrays out, no checks.

Each file is closed under jitted calls, because the compilation cache is stamped by the file of the
outer function. Parallel kernels (``*_par``) are leaves that only Python calls; each has a serial
twin of another name that gives the same bits.
"""
