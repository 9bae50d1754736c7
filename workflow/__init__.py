"""The workflow around the workers: launchers, data, command line."""
