"""Programs to start from. Each runs by itself (`python -m examples.quickstart`) and in tests/test_examples.py."""
