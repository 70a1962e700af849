"""Compare a distilled run with its teacher on the teacher's evaluation rows.

    python benchmarks/distil.py --run RUN --students FOLDER [--data DIR] [--draws 10] [--rows 500] [--json FILE]

RUN is the folder of a run with draws, the teacher. Unless FOLDER already has its student, `bayestune distil` makes one
there from --draws draws of the teacher; the teacher is scored with other draws. Prints one JSON object. "nll_ratio" is
the student's NLL divided by the teacher's, "ece_difference" the student's bias-corrected ECE minus the teacher's, and
"teacher_mean" has the scores of the teacher's mean, which also costs one forward.
"""

from pathlib import Path

from options import add_json, parser, positive, publish

from bayestune import evaluate
from bayestune.experiment import load_run
from bayestune.experiment.record import rows_sha256
from bayestune_cli.app import invoke


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--run", type=Path, required=True)
    made.add_argument("--students", type=Path, required=True)
    made.add_argument("--data", help="folder of data sets; default: that of the run")
    made.add_argument("--draws", type=positive, default=10)
    made.add_argument("--rows", type=positive, default=500)
    add_json(made)
    options = made.parse_args()
    student = options.students / options.run.name
    if not (student / "result.json").is_file():
        options.students.mkdir(exist_ok=True)
        data = [] if options.data is None else ["--data", options.data]
        command = ["distil", str(options.run), "--output", str(student), "--draws", str(options.draws), *data]
        if invoke(command):
            made.exit(1)
    teacher, pupil = (load_run(folder, data=options.data) for folder in (options.run, student))
    rows = teacher.task.rows(teacher.experiment.eval_split)[: options.rows]
    scores = {
        "teacher": evaluate(teacher.predict(rows, draws=options.draws, seed=1, progress=True)).as_dict(),
        "teacher_mean": evaluate(teacher.predict(rows, draws=0)).as_dict(),
        "student": evaluate(pupil.predict(rows, draws=0)).as_dict(),
    }
    found = {
        "nll_ratio": scores["student"]["nll"] / scores["teacher"]["nll"],
        "ece_difference": scores["student"]["ece_corrected"] - scores["teacher"]["ece_corrected"],
        "model": teacher.experiment.model,
        "task": teacher.task.name,
        "method": teacher.experiment.method.name,
        "seed": teacher.experiment.seed,
        "rows": len(rows),
        "rows_sha256": rows_sha256(rows),
        "draws": options.draws,
        "scores": scores,
    }
    publish(found, options)


if __name__ == "__main__":
    main()
