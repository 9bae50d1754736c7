"""What docs/reliability.md promises, a row of its table each: ``pytest.mark.row(n)``."""
