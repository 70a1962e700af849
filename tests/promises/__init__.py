"""The properties that bayestune keeps, and the page that says which tests show them, made from runs of these tests."""
