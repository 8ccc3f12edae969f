"""What test modules share: helpers, grouped by what they are about. Fixtures that all may use are in conftest.py."""
