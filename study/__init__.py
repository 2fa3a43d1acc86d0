"""The study behind the README's findings; `python -m study --help` lists its commands."""
