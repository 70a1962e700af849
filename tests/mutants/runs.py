"""Defects of data, reports and runs."""

from mutants.defect import Defect

DEFECTS = (
    Defect(
        name="a field given twice in a row",
        path="tasks/data.py",
        before="object_pairs_hook=_unique, parse_constant=_refuse_constant",
        after="parse_constant=_refuse_constant",
        tests="tasks/test_data.py D01",
    ),
    Defect(
        name="a negative label counts from the end",
        path="tasks/data.py",
        before="if not 0 <= self.answer < len(self.choices):",
        after="if not self.answer < len(self.choices):",
        tests="tasks/test_data.py D03",
    ),
    Defect(
        name="a row that is too long is taken",
        path="tasks/base.py",
        before="        if tokens > self.max_tokens:",
        after="        if False:",
        tests="tasks/test_multiple_choice.py D06",
    ),
    Defect(
        name="texts of a report are not escaped",
        path="report/html.py",
        before="autoescape=True",
        after="autoescape=False",
        tests="report/test_html.py X05",
    ),
    Defect(
        name="every process writes",
        path="experiment/processes.py",
        before='return int(os.environ.get("RANK", "0")) == 0',
        after="return True",
        tests="test_launch.py torchrun",
    ),
    Defect(
        name="all members of an ensemble have one seed",
        path="experiment/methods.py",
        before='derive_seed("member", experiment.seed, number) % 2**31',
        after="experiment.seed",
        tests="test_methods.py first_member",
    ),
    Defect(
        name="a table takes part of a run for the whole",
        path="experiment/grid.py",
        before='return {cell["draws"] for cell in found} >= counts(experiment)',
        after="return bool(found)",
        tests="experiment/test_grid.py killed",
    ),
    Defect(
        name="the widest trial instead of the widest accepted",
        path="posteriors/tfb.py",
        before="(trial for trial in trace if trial.accepted)",
        after="trace",
        tests="posteriors/test_tfb.py what_is_returned",
    ),
    Defect(
        name="a fit on the rows that are scored",
        path="experiment/run.py",
        before="        if shared:\n",
        after="        if False:\n",
        tests="test_methods.py refused_and_nothing",
    ),
    Defect(
        name="a folder that filled while weights were loaded is written to",
        path="experiment/folder.py",
        before="        _check_content(output, experiment, overwrite=overwrite, resume=resume)\n        with _in",
        after="        with _in",
        tests="cli/test_contract.py P11",
    ),
    Defect(
        name="a run is made without its lock",
        path="experiment/folder.py",
        before="    return alone(output if os.access(output.parent, os.W_OK | os.X_OK) else output / _INSIDE)",
        after='    return __import__("contextlib").nullcontext()',
        tests="experiment/test_folder.py P11",
    ),
    Defect(
        name="an output that is not UTF-8 is found out at the end",
        path="experiment/folder.py",
        before="        str(output.absolute()).encode()\n",
        after="        pass\n",
        tests="cli/test_contract.py R08_an_output_that_is_not",
    ),
    Defect(
        name="a full disk at an export is an internal error",
        path="bayestune_cli/trained.py",
        before="    with writing(output):\n        folders",
        after="    if True:\n        folders",
        tests="cli/test_disk.py export",
    ),
)
