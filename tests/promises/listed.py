"""The promises, in the order of docs/properties.md."""

from promises.promise import Promise

PROMISES = (
    Promise(id="S01", says="The KL is that of two normal distributions, for both signs of G."),
    Promise(id="S02", says="The KL's gradient is the closed form; G = 0 is held away from, never NaN."),
    Promise(id="S03", says="The training gradient equals finite differences under the same noise."),
    Promise(
        id="S04",
        says="The training gradient is that of the ELBO on average: minibatches, flipout.",
        note="Two processes are two noise streams in one process here; R06 trains in two real ones.",
    ),
    Promise(id="S05", says="The loss is the mean of the draws' NLLs, never the NLL of averaged logits."),
    Promise(id="S06", says="On a conjugate model training ends at the known mean-field optimum."),
    Promise(
        id="S07", says="On a logistic model it ends at the optimum found by quadrature; without data, at the prior."
    ),
    Promise(
        id="S08",
        says="Simulation-based calibration: parameters and log-likelihood have uniform ranks.",
        note=(
            "Where weights depend on each other in the posterior, a mean-field one is narrower: nominal 90 % "
            "intervals cover 2 Phi(1.645 s_MF / s_true) - 1, which is less. What training finds is calibrated, then, "
            "only as far as the weights are independent."
        ),
    ),
    Promise(
        id="S09",
        says="The posterior over A is the low-rank posterior over full weights (theorems 3.1, 3.2).",
        note=(
            "Where B has not full rank (it starts at 0) the KL of A exceeds that of the full weights: what B cannot "
            "see is regularised all the same."
        ),
    ),
    Promise(id="S10", says="Draws are independent normals: over draws, layers, rows, ranks."),
    Promise(
        id="S11",
        says="One draw is one weight matrix: equal tokens, caches and generation agree.",
        note=(
            "The option flipout_token, which is the released code's noise, draws signs for every token of a training "
            "forward: it is not one matrix. Draws for prediction do not know it."
        ),
    ),
    Promise(
        id="S12",
        says="Flipout has mean zero, the right variance, and no covariance across rows.",
        note=(
            "Uncorrelated is not independent: the squares of two rows' perturbations share one E. Flipout is for "
            "training alone; predictions use draws that all rows share."
        ),
    ),
    Promise(id="S13", says="Dropout is one mask for the mean and the noise."),
    Promise(id="S14", says="Without variance it is plain LoRA; with B = 0 every draw is the base model."),
    Promise(id="S15", says="Evaluation is the mean; a disabled adapter is the base; merged draws are refused."),
    Promise(id="S16", says="The predictive is the mean of the draws' probabilities, in any order and stacking."),
    Promise(
        id="S17",
        says="The objective is scaled rightly for any batch, accumulation, cycle and schedule.",
        note=(
            "The paper's weights add up to 1 - 1/(2^(M+1) - 1) over a cycle of M updates, as in the released code: "
            "2/3 for M = 1, 1 to float64 from M = 52. Rows that dataloader_drop_last drops are not in the objective; "
            "an epoch in which it drops all is refused."
        ),
    ),
    Promise(id="S18", says="Evaluation during training changes nothing."),
    Promise(
        id="S19",
        says="Metrics equal float64 oracles and other libraries; bad probabilities are named.",
        note=(
            "Scores read all rows at once: there is no streaming in chunks. A million rows are within 1e-9 of numpy's."
        ),
    ),
    Promise(id="S20", says="Every metric is an average over rows, whatever the batches."),
    Promise(
        id="S21",
        says="Reported intervals cover the truth as often as they say.",
        note=(
            "Percentile intervals: of 200 rows, 95 % intervals cover 94.5 %. Near perfect calibration the interval of "
            "the ECE lies above the true value."
        ),
    ),
    Promise(id="N01", says="M, G, the KL and the optimiser stay float32 on half-precision bases."),
    Promise(id="N02", says="Logit gaps up to 1e4 and absent choices give finite losses and gradients."),
    Promise(
        id="N03",
        says="The KL of a billion parameters is exact to 1e-6.",
        note=(
            "The KL is never added to the NLL: training uses its gradient in closed form, and only the log needs the "
            "sum."
        ),
    ),
    Promise(
        id="N04",
        says="A large KL beside a small NLL loses neither, in the update or in the log; the KL is summed in float64.",
        note="The logged NLL has the digits of float32: transformers adds up the losses between two logs in it.",
    ),
    Promise(
        id="N05",
        says="Rows without a token to look at are refused or answered, never NaN.",
        bound="refused or finite",
        note=(
            "A text that the tokenizer by itself turns into no token is refused by its row and field. "
            "A task of your own whose row is "
            "masked as a whole gets an answer, which means nothing."
        ),
    ),
    Promise(id="N06", says="A GPU answers as the CPU does, in float32 and in bf16."),
    Promise(
        id="N07",
        says="Padding, batch and neighbours do not matter to a row.",
        note=(
            "Of training noise this holds in distribution: the numbers themselves follow from the row's place in its "
            "batch. Draws for prediction do not depend on the batch at all."
        ),
    ),
    Promise(
        id="N08",
        says="Compilation, checkpointing, attention kernels and quantised bases keep the draw.",
        note="On an int8 base (bitsandbytes) stacked draws agree to 1/127: its activations are rounded to 8 bits.",
    ),
    Promise(
        id="N09",
        says="Weight decay spares M and G; who gets what is pinned.",
        note="Gradient clipping acts on the NLL gradients of M, G and B, not on the KL.",
    ),
    Promise(id="P01", says="A saved posterior answers bit-equal in a fresh process."),
    Promise(
        id="P02",
        says="A save killed at any filesystem call leaves the old state or the new, whole.",
        note=(
            "Calls that Python makes; a file opened to be written is left torn. Power cuts are met by fsync, untested."
        ),
    ),
    Promise(id="P03", says="So do real kills at random times."),
    Promise(
        id="P04",
        says="Resuming skips broken checkpoints by name; the last good one is never removed.",
        note="A broken one counts towards save_total_limit. Named outright, it is refused.",
    ),
    Promise(
        id="P05",
        says="A resumed run is the uninterrupted one, bit for bit, wherever it stopped.",
        note="On CPUs, one process and two; SWAG's snapshots are in no checkpoint, its tail starts anew.",
    ),
    Promise(id="P06", says="A posterior for another base, or with other settings, is refused by name."),
    Promise(id="P07", says="A posterior is never lost by loading it as plain LoRA, nor made from plain LoRA."),
    Promise(
        id="P08",
        says="Bit flips, cuts and additions are refused before a tensor is used.",
        note="A model card (README.md) of a posterior is not checked, nor read. Sums find damage, not malice: who can "
        "write a folder can write its sums; wrong contents of a posterior under right sums raise the library's errors "
        "only, and of a checkpoint the form of training.json is checked.",
    ),
    Promise(id="P09", says="No pickle is written or opened."),
    Promise(
        id="P10",
        says="Names that are paths, links that lead out, are refused before any write.",
        note="Names of adapters; a run is given as a path, which may lead anywhere. CON and lora_ are in the "
        "allow-list: no name of an adapter becomes that of a posterior's folder.",
    ),
    Promise(
        id="P11",
        says="Two writers of one folder: one is told; a reader never sees a mix.",
        note=(
            "A reader in the middle of a replacement can be refused (PosteriorError); it finds the new one next time."
        ),
    ),
    Promise(id="P12", says="Folders of every released format load and answer as they did."),
    Promise(id="P13", says="The base model is never changed, also after exceptions."),
    Promise(
        id="D01",
        says="A malformed line is refused with file, line and field; nothing is dropped.",
        note=(
            "nothing is ever skipped: there is no option to skip bad rows, so nothing can be dropped. Lines "
            "over 10 MB are taken for a broken file."
        ),
    ),
    Promise(id="D02", says="A missing or mistyped label is refused; rows to predict need none."),
    Promise(id="D03", says="A label out of range is refused."),
    Promise(
        id="D04",
        says="Bad choices are refused.",
        note=(
            "two to 26 choices, one for each letter; a wrong choice may be there twice, as in published data, "
            "the answer may not."
        ),
    ),
    Promise(id="D05", says="Empty texts are refused."),
    Promise(
        id="D06",
        says="A row that is too long is refused and counted, never cut.",
        note=(
            "refusing is the one policy: neither cutting nor dropping is offered; the error says how many "
            "rows are too long."
        ),
    ),
    Promise(
        id="D07",
        says="Text of any script round-trips; what cannot be written is refused.",
        note="NUL and lone surrogates are refused. NFC and NFD stay different texts, and different ids.",
    ),
    Promise(
        id="D08",
        says="Repeated ids are refused; rows of train that are also scored are reported.",
        note=(
            "ids are texts: a number as id is refused. Repeated rows are counted in result.json and warned "
            "of, not refused, as published splits have them (14 of the 500 test rows of OpenBookQA are in its "
            "train split with the choices in another order); up to case, blanks, NFKC and the order of "
            "choices. `bayestune evaluate` on another split does not look at the training rows, and a run with "
            "`--adapter` only at the splits that it names itself, not at those the adapter was trained on."
        ),
    ),
    Promise(id="D09", says="The scored tokens are those of the prompt with its label, for every tokenizer."),
    Promise(
        id="D10",
        says="Tokenizers without a pad token, with added tokens or doubled BOS are handled or refused.",
        note=(
            "no chat template is used. A tokenizer's own pad, or else its EOS, pads; with neither, id 0, "
            "which a decoder's classification head would not read at the end of a text. A text that spells a "
            "special token is tokenised as the tokenizer does by default."
        ),
    ),
    Promise(id="D11", says="One class, few rows, a last batch of one: trained and scored, or refused by name."),
    Promise(
        id="D12",
        says="Permuted labels permute the probabilities, also after training.",
        note=(
            "where a class is a label or a choice scored by itself. Where a causal model answers with a "
            "letter, other places give other prompts; there a letter's score does not depend on its place "
            "among those scored."
        ),
    ),
    Promise(
        id="D13",
        says="Data that changes under a run does not change it; a run is not resumed on other rows.",
        note=(
            "rows are read once and hashed as read, so a file that changes later changes nothing in that run; "
            "resuming with other training rows is refused. Rows to be scored are hashed in result.json and "
            "may change between the two parts of a resumed run."
        ),
    ),
    Promise(
        id="D14",
        says="The order of rows follows from the seed; results are keyed by id.",
        note=(
            "the order is over places in the file: a shuffled file is another run (and another hash) with the "
            "same rows."
        ),
    ),
    Promise(
        id="R01",
        says="Out of memory: smaller micro-batches, the same effective batch and result.",
        note=(
            "On GPUs, whose allocator says so (torch.OutOfMemoryError); a CPU's ends the run, and so does memory "
            "that runs out in the optimiser's own step. Noise and dropout masks are drawn by micro-batch. Where "
            "memory runs out in the first update and the smaller size divides the larger, the run is bit for bit "
            "that of the smaller micro-batches from the start; where later, that of large ones before and small "
            "ones from there on, which for plain LoRA without dropout is the same to rounding. The smaller size "
            "is in no checkpoint: a resumed run starts with whole micro-batches, and repeats the other bit for "
            "bit where memory runs out again in its first update. Of several processes one cannot do this alone: "
            "it stops the run and says which it is. Predictions in other chunks are equal to rounding of float64, "
            "not to the bit."
        ),
    ),
    Promise(
        id="R02",
        says="A missing GPU is said before weights are loaded; a lost one leaves the last checkpoint.",
        note="There is no flag for the device: a GPU is used where torch sees one, else the CPU, and result.json "
        "says which. Without a GPU everything runs, bf16 and quantised bases too; a package that they need "
        "is asked for before weights are loaded. The loss of a device is shown with the error that torch "
        "raises, not on a GPU: exit 1, resumable.",
    ),
    Promise(
        id="R03",
        says="A full disk stops the run with what is needed; the last checkpoint stays whole.",
        note="Shown with a real limit on the size of files for checkpoints and exports, with injected errors for "
        "posterior, record and answers. What is needed is an estimate from the weights; free space is told for a full "
        "disk, not for a quota. A log that takes no more is silent from then on.",
    ),
    Promise(
        id="R04",
        says="SIGINT and SIGTERM in any phase: exit 130 or 143, resumable.",
        bound="same bytes; 30 s to end",
        note="With checkpoints on, a signal waits for the update and its checkpoint, as long as these take. "
        "Several processes, fits, and runs without checkpoints end at once. A second signal has the "
        "system's own effect. While the program is being imported a signal has Python's own effect.",
    ),
    Promise(
        id="R05",
        says="NaN stops before the update, and names step, part, rows and the last good checkpoint.",
        note="The KL is of no row: its message names the layer. The rows of a gradient are found by running each row "
        "of the update again alone; where the cause is a draw of the noise that does not come again, all rows of the "
        "update are named. A logit of -inf for a class that is not the answer is a masked choice, not an error.",
    ),
    Promise(
        id="R06",
        says="Two processes train what one trains; the KL counts once.",
        note="Each process draws noise of its own: two processes of BLoB are one whose micro-batches are given that "
        "noise, not one without more. Where the rows do not fill the last batch of an epoch in every process, "
        "accelerate goes on with the first rows; one process does not.",
    ),
    Promise(
        id="R07",
        says="A dead process ends the run in time, and leaves a good checkpoint.",
        note="The launcher (torchrun) names the dead process; the others only see its connection close. One that "
        "hangs is noticed after `ddp_timeout`, by default 30 minutes. Shown with gloo, on a CPU.",
    ),
    Promise(
        id="R08",
        says="Odd environments: no HOME, no terminal, C locale, read-only folders, odd paths.",
        note="The C locale is Python's, which writes UTF-8. Seconds are those of a monotonic clock.",
    ),
    Promise(id="R09", says="Exit codes, one line on stderr, JSON also for failures, no traceback."),
    Promise(
        id="R10",
        says="A result records all that made it, and can be made again from its record.",
        note="`bayestune train --config RESULT.json`: the same numbers with the same machine, versions and "
        "threads; what differs from the record is named before training. The demo's own result.json has no "
        "hashes, those of its two runs do.",
    ),
    Promise(
        id="X01",
        says="Code beside a model or a posterior is never run.",
        note="No flag and no file switches code of a model on, so no revision has to be pinned for it.",
    ),
    Promise(
        id="X02",
        says="Older versions of what bayestune stands on are refused with a clear error.",
        note="The whole range of the metadata is checked, newer majors too; not in a source tree that is not "
        "installed. An audit of known vulnerabilities needs a network and is no part of these tests.",
    ),
    Promise(
        id="X03",
        says="The whole command line works without a network and does not try it.",
        note="Attempts are counted by an audit hook of Python, in a network namespace without interfaces where the "
        "system allows one. With bitsandbytes and the package kernels both installed, the import of "
        "bitsandbytes asks the Hub for a kernel, whatever is then done; HF_HUB_OFFLINE=1 keeps it from that.",
    ),
    Promise(id="X04", says="No telemetry: no tracker is imported, nothing is sent."),
    Promise(
        id="X05",
        says="Texts from outside stay texts in pages, tables and terminals.",
        note="No CSV is written and no JSON stands in a page, so there is none to escape.",
    ),
    Promise(
        id="X06",
        says="No secret, prompt or home path is in what is written; file modes follow umask.",
        note="The command, the paths of model and data and the name of the base are recorded as they were given, "
        "for a run is loaded by them: absolute paths if such were given. Errors on the terminal name files, "
        "some by their whole path. The tensors of checkpoints are kept to their owner (0600) under any umask. "
        "torch makes an empty folder for its compiler beside the temporary files.",
    ),
    Promise(
        id="X07",
        says="Absurd configurations are refused within a second.",
        note="Bounded, not timed: a file of settings has at most 1 MiB of JSON in 64 levels or 64 KiB of YAML in 8 "
        "without references; ranks and lists have largest sizes; a regular expression in it has at most 256 "
        "characters, stars only after dots and at most three stars and groups, so longer ones must become "
        "lists of names. A record of a run or of a table has at most 16 MiB in 64 levels.",
    ),
    Promise(
        id="X08",
        says="The wheel is reproducible and holds no binary.",
        note="There has been no release yet: no list of parts (SBOM) and no signature. Checks on a server run one "
        "script of the repository and no actions of others.",
    ),
    Promise(id="K01", says="Ten thousand predictions: no growth of memory, tensors, hooks or descriptors."),
    Promise(
        id="K02",
        says="Nor do they slow down.",
        bound="see the note",
        note="Not timed: operations of torch and calls of Python functions are counted; the last call has as "
        "many as the tenth.",
    ),
    Promise(
        id="K03",
        says="Threads with draws of their own answer as if alone.",
        note="Which adapters are active belongs to the model, not to a thread; threads that want different ones "
        "need models of their own.",
    ),
    Promise(id="K04", says="Seeded answers neither read nor move any global random state."),
    Promise(
        id="K05",
        says="Training killed again and again ends where the undisturbed run ends.",
        note="60 updates killed every 1 to 8 of them, rather than 24 hours.",
    ),
    Promise(id="K06", says="Draws nest; copies and pickles of a model have the same draws."),
)
