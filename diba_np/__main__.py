"""``python -m diba_np`` is the same program as ``diba-np``."""

from diba_np.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
