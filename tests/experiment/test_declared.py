"""What is made from the declarations of settings is as `make declared` writes it."""

from bayestune.experiment.declared import written


def test_options_and_page_are_made_from_the_declarations() -> None:
    for path, text in written().items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name}: run make declared"
