"""Defects of checkpoints, of saves that are killed, and of writers that meet."""

from mutants.defect import Defect

FILES = "training/checkpoint_files.py"
CHECKPOINT = "training/checkpoint.py"
FOLDER = "files.py"
FAULTS = "training/test_checkpoint_faults.py"

DEFECTS = (
    Defect(
        name="a checkpoint is written where it is looked for",
        path=CHECKPOINT,
        before="            self._saves_to = run / UNFINISHED\n",
        after="",
        tests=f"{FAULTS} P02",
    ),
    Defect(
        name="the hashes of a checkpoint are not compared",
        path=FILES,
        before="        if found != record:",
        after='        if found["bytes"] != record["bytes"]:',
        tests=f"{FAULTS} P08",
    ),
    Defect(
        name="the manifest of a checkpoint is taken without its checksum",
        path=FILES,
        before='serialised({k: v for k, v in found.items() if k != "checksum"}) != text:',
        after="False:",
        tests=f"{FAULTS} P08",
    ),
    Defect(
        name="a named checkpoint is used unchecked",
        path=CHECKPOINT,
        before="        names = check_checkpoint(checkpoint)\n",
        after='        names = {path.name for path in checkpoint.rglob("*")}\n',
        tests=f"{FAULTS} P08",
    ),
    Defect(
        name="a link in a checkpoint is followed",
        path=FILES,
        before="        if path.is_symlink():",
        after="        if False:",
        tests=f"{FAULTS} P10",
    ),
    Defect(
        name="a link for the working folder of checkpoints is followed",
        path=FILES,
        before="    if work.is_symlink():\n        work.unlink()\n",
        after="",
        tests=f"{FAULTS} P10",
    ),
    Defect(
        name="a broken checkpoint is passed over silently",
        path=FILES,
        before="            if checkpoint not in waiting:",
        after="            if False:",
        tests=f"{FAULTS} P04",
    ),
    Defect(
        name="the first checkpoint instead of the last",
        path=FILES,
        before="[*_checkpoints(folder), *waiting], key=_step, reverse=True)",
        after="[*_checkpoints(folder), *waiting], key=_step)",
        tests=f"{FAULTS} P04",
    ),
    Defect(
        name="the older checkpoint goes before the new one stands",
        path=CHECKPOINT,
        before="                seal(written)\n",
        after="                for old in run.glob('checkpoint-*'):\n"
        "                    old.rename(run / UNFINISHED / f'gone-{old.name}')\n"
        "                seal(written)\n",
        tests=f"{FAULTS} P04",
    ),
    Defect(
        name="the best checkpoint is rotated away",
        path=CHECKPOINT,
        before="{run / name} | ({Path(best)} if best else set())",
        after="{run / name}",
        tests=f"{FAULTS} P04",
    ),
    Defect(
        name="the best checkpoint is looked for where it was written",
        path=CHECKPOINT,
        before="                    self.state.save_to_json(str(written / STATE))\n",
        after="                    pass\n",
        tests=f"{FAULTS} P04",
    ),
    Defect(
        name="a checkpoint that was whole when its save was killed is thrown away",
        path=FILES,
        before="        publish(written, run)\n    shutil",
        after="        continue\n    shutil",
        tests=f"{FAULTS} P02",
    ),
    Defect(
        name="what a killed save left is taken for a checkpoint",
        path=FILES,
        before="        except TrainingError:\n            continue\n",
        after="        except TrainingError:\n            pass\n",
        tests=f"{FAULTS} P02",
    ),
    Defect(
        name="two processes save checkpoints to one folder",
        path=FILES,
        before="    with alone(work):\n",
        after="    if True:\n",
        tests=f"{FAULTS} P11",
    ),
    Defect(
        name="two processes save a posterior to one folder",
        path=FOLDER,
        before="        lock.acquire(timeout=0)\n",
        after="        pass\n",
        tests="storage/test_storage.py P11",
    ),
    Defect(
        name="the second of two writers replaces what the first one wrote",
        path=FOLDER,
        before="        _check_target(target, overwrite)  # again",
        after="        pass  # again",
        tests="storage/test_storage.py P11",
    ),
    Defect(
        name="the litter of killed saves stays",
        path=FOLDER,
        before="        if litter.fullmatch(path.name):",
        after="        if False:",
        tests="storage/test_storage.py P02",
    ),
    Defect(
        name="one update more where a finished run is resumed",
        path=CHECKPOINT,
        before="        if self.state.global_step < self.state.max_steps:",
        after="        if True:",
        tests="training/test_checkpoint.py P05",
    ),
    Defect(
        name="random states are not restored",
        path=CHECKPOINT,
        before='            load_random_state(Path(checkpoint) / f"rng_{self.args.process_index}", self.args.device)',
        after="            pass",
        tests="training/test_checkpoint.py P05",
    ),
    Defect(
        name="a checkpoint of any adapter name",
        path="training/checks.py",
        before="        check_name(adapter)\n",
        after="        pass\n",
        tests=f"{FAULTS} P10",
    ),
    Defect(
        name="the square of the square of G in the golden folder",
        path="functional.py",
        before="return rho * rho\n",
        after="return rho * rho * rho.abs()\n",
        tests="test_golden.py P12",
    ),
    Defect(
        name="a checkpoint may say that any number of processes wrote it",
        path=FILES,
        before="    if type(processes) is not int or not 1 <= processes <= files:",
        after="    if type(processes) is not int or processes < 1:",
        tests=f"{FAULTS} more",
    ),
    Defect(
        name="settings that are not JSON end the search for a checkpoint",
        path=FILES,
        before="    except (ValueError, RecursionError) as error:",
        after="    except RecursionError as error:",
        tests=f"{FAULTS} sums",
    ),
    Defect(
        name="the form of the settings of a checkpoint is not checked",
        path=FILES,
        before="    if not isinstance(found, dict) or any(type",
        after="    if False and any(type",
        tests=f"{FAULTS} sums",
    ),
)
