"""What is measured: each module is a program, which `make bench` and its like start."""
