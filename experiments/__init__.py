"""What people run: each module is `python -m experiments.<name>`."""
