"""``python -m modelopt_cli``, the same as the ``modelopt`` command."""

from modelopt_cli.cli.main import run

if __name__ == "__main__":
    run()
