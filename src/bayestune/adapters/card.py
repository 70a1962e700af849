"""The note in the model card of a saved posterior: without `import bayestune` PEFT stops with a bare KeyError."""

import os
from pathlib import Path

HEADING = "## Loading this posterior"
NOTICE = f"""{HEADING}

This folder holds a *distribution* over LoRA adapters, made with `bayestune`. Import it first, so PEFT knows the type.

```python
import bayestune  # without this line PEFT stops with KeyError: 'BAYES_LORA'
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "this/folder")  # or bayestune.load_posterior: it checks the files
```

`model` uses the posterior mean; `bayestune.predict(model, task, rows, draws=10)` averages draws. For programs that
know only LoRA, `bayestune.export_lora(model, "folder")` writes the mean and any draws as ordinary LoRA adapters.
"""


def add_notice(folder: str | os.PathLike[str]) -> None:
    """Append the notice to `folder`/README.md unless it is there already; create the file if PEFT has not."""
    card = Path(folder) / "README.md"
    text = card.read_text(encoding="utf-8") if card.exists() else ""
    if HEADING not in text:
        card.write_text(f"{text.rstrip()}\n\n{NOTICE}".lstrip(), encoding="utf-8")
