"""Defects of the KL rate of a width, tables and flags."""

from mutants.defect import Defect

WIDTH = "training/posterior_std.py"
TABLE_GRID = "tables/grid.py"

DEFECTS = (
    Defect(
        name="width grown by the whole rate in every update",
        path=WIDTH,
        before="weights.append(share * schedule(step, cycle))",
        after="weights.append(schedule(step, cycle))",
        tests="training/test_posterior_std.py recursion",
    ),
    Defect(
        name="width grown twice as fast",
        path=WIDTH,
        before="g + 2 * rate * weight",
        after="g + 4 * rate * weight",
        tests="training/test_posterior_std.py",
    ),
    Defect(
        name="warm-up one update shorter",
        path=WIDTH,
        before="rising = math.ceil(warmup * updates)",
        after="rising = math.floor(warmup * updates)",
        tests="training/test_posterior_std.py recursion",
    ),
    Defect(
        name="KL rate of a short run without its bound",
        path=WIDTH,
        before="highest = prior_std**2",
        after="highest = 1e9",
        tests="training/test_posterior_std.py",
    ),
    Defect(
        name="first width of the middle of the start",
        path=WIDTH,
        before="return rho_init**2 * (1 - low**3) / (3 * (1 - low))",
        after="return rho_init**2 * ((1 + low) / 2) ** 2",
        tests="training/test_posterior_std.py first_width",
    ),
    Defect(
        name="line without its own settings",
        path=TABLE_GRID,
        before="{**settings, **LINES[line].settings}",
        after="settings",
        tests="tables/test_grid.py line_with",
    ),
    Defect(
        name="two lines of a table under the name of their method",
        path="tables/fill.py",
        before="method=planned.line,",
        after="method=experiment.method,",
        tests="tables/test_grid.py line_with",
    ),
    Defect(
        name="flags of other methods taken in silence",
        path="bayestune_cli/training.py",
        before="if name in given and method not in methods:",
        after="if False:",
        tests="test_cli.py another_method",
    ),
    Defect(
        name="record with G for the standard deviation",
        path="experiment/run.py",
        before="std(layer.rho.detach()).flatten()",
        after="layer.rho.detach().flatten()",
        tests="test_cli.py record_says",
    ),
    Defect(
        name="rate of the file beside the width of a flag",
        path="bayestune_cli/training.py",
        before='if {"kl_learning_rate", "posterior_std"} & given.keys():',
        after="if False:",
        tests="test_cli.py flags_win",
    ),
    Defect(
        name="cells of methods without a KL told apart by it",
        path="tables/cells.py",
        before='settings.get("method") not in KL_METHODS',
        after="False",
        tests="tables/test_grid.py does_not_count",
    ),
    Defect(
        name="runs of methods without a KL told apart by it",
        path=TABLE_GRID,
        before='wanted["method"] not in KL_METHODS',
        after="False",
        tests="tables/test_grid.py does_not_count",
    ),
    Defect(
        name="a run too short for its width without a word",
        path="experiment/train.py",
        before="if reached < 0.99 * experiment.posterior_std:",
        after="if False:",
        tests="test_cli.py too_short",
    ),
    Defect(
        name="a start wider than the prior jumps to it",
        path=WIDTH,
        before="if g <= best else max(moved, best)",
        after="",
        tests="training/test_posterior_std.py wider",
    ),
    Defect(
        name="a width outside the start and the prior found out late",
        path="experiment/settings.py",
        before="if self.posterior_std is not None and self.method in KL_METHODS:",
        after="if False:",
        tests="test_experiment.py outside",
    ),
)
