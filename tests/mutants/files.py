"""Defects of saved posteriors."""

from mutants.defect import Defect

STATE = "storage/state.py"
STORAGE = "storage/folders.py"
MANIFEST = "storage/manifest.py"
FOLDER = "files.py"

DEFECTS = (
    Defect(
        name="a standard deviation of 0 is saved",
        path=STATE,
        before='        if key.endswith((".lora_A.rho", ".lora_B.rho")) and not torch.all(tensor != 0):',
        after="        if False:",
        tests="storage/test_storage.py would_not_come_back",
    ),
    Defect(
        name="an unknown setting is ignored",
        path=STATE,
        before="        if name not in defaults:\n            return",
        after="        if name not in defaults:\n            continue\n            return",
        tests="storage/test_faults.py P06",
    ),
    Defect(
        name="a superfluous tensor is ignored",
        path=STATE,
        before="    for key in sorted(found.keys() - expected.keys()):",
        after="    for key in sorted(set()):",
        tests="storage/test_faults.py P06",
    ),
    Defect(
        name="other weights of the same shapes are taken for the base",
        path=STORAGE,
        before="    difference = weights_difference(manifest",
        after="    difference = None and weights_difference(manifest",
        tests="storage/test_faults.py P06",
    ),
    Defect(
        name="hashes are not compared",
        path=MANIFEST,
        before='        if digest != record["sha256"]:',
        after="        if False:",
        tests="storage/test_faults.py P08",
    ),
    Defect(
        name="the manifest's own checksum is not compared",
        path=MANIFEST,
        before="    if serialised(found) != text:",
        after="    if False:",
        tests="storage/test_faults.py P08",
    ),
    Defect(
        name="files that the manifest does not list are let in",
        path=MANIFEST,
        before="        if entry.name not in allowed:",
        after="        if False:",
        tests="storage/test_faults.py P09",
    ),
    Defect(
        name="the old posterior is removed before the new one stands",
        path=FOLDER,
        before="            os.rename(target, aside)\n",
        after="            shutil.rmtree(target)\n",
        tests="storage/test_storage.py P02",
    ),
    Defect(
        name="nothing is flushed to the disk",
        path=FOLDER,
        before="            flush(work)\n",
        after="",
        tests="storage/test_storage.py on_disk",
    ),
    Defect(
        name="a key given twice",
        path=FOLDER,
        before="json.loads(decoded, object_pairs_hook=_unique, ",
        after="json.loads(decoded, ",
        tests="storage/test_faults.py P06",
    ),
    Defect(
        name="any adapter name becomes a path",
        path=STATE,
        before="    if not _NAME.fullmatch(adapter):",
        after="    if False:",
        tests="storage/test_storage.py P10",
    ),
    Defect(
        name="a resumed run with other settings",
        path="training/checkpoint_state.py",
        before='        if saved["settings"].get(name) != value:',
        after="        if False:",
        tests="training/test_checkpoint.py settings",
    ),
    Defect(
        name="the exported draw is another one",
        path="serving/lora.py",
        before="weights.get(index, {})",
        after="weights.get(0, {})",
        tests="serving/test_lora.py ensemble",
    ),
)
