"""The promises, in the order of docs/properties.md."""

from promises.promise import Promise

PROMISES = (
    Promise(id="S01", says="The KL is that of two normal distributions, for both signs of G."),
    Promise(id="S02", says="The KL's gradient is the closed form; G = 0 is held away from, never NaN."),
    Promise(id="S03", says="The training gradient equals finite differences under the same noise."),
    Promise(id="S04", says="The training gradient is that of the ELBO on average: minibatches, flipout."),
    Promise(id="S05", says="The loss is the mean of the draws' NLLs, never the NLL of averaged logits."),
    Promise(id="S06", says="On a conjugate model training ends at the known mean-field optimum."),
    Promise(
        id="S07", says="On a logistic model it ends at the optimum found by quadrature; without data, at the prior."
    ),
    Promise(id="S08", says="Simulation-based calibration: parameters and log-likelihood have uniform ranks."),
    Promise(id="S09", says="The posterior over A is the low-rank posterior over full weights (theorems 3.1, 3.2)."),
    Promise(id="S10", says="Draws are independent normals: over draws, layers, rows, ranks."),
    Promise(id="S11", says="One draw is one weight matrix: equal tokens, caches and generation agree."),
    Promise(id="S12", says="Flipout has mean zero, the right variance, and no covariance across rows."),
    Promise(id="S13", says="Dropout is one mask for the mean and the noise."),
    Promise(id="S14", says="Without variance it is plain LoRA; with B = 0 every draw is the base model."),
    Promise(id="S15", says="Evaluation is the mean; a disabled adapter is the base; merged draws are refused."),
    Promise(id="S16", says="The predictive is the mean of the draws' probabilities, in any order and stacking."),
    Promise(id="S17", says="The objective is scaled rightly for any batch, accumulation, cycle and schedule."),
    Promise(id="S18", says="Evaluation during training changes nothing."),
    Promise(id="S19", says="Metrics equal float64 oracles and other libraries; bad probabilities are named."),
    Promise(id="S20", says="Every metric is an average over rows, whatever the batches."),
    Promise(id="S21", says="Reported intervals cover the truth as often as they say."),
    Promise(id="N01", says="M, G, the KL and the optimiser stay float32 on half-precision bases."),
    Promise(id="N02", says="Logit gaps up to 1e4 and absent choices give finite losses and gradients."),
    Promise(id="N03", says="The KL of a billion parameters is exact to 1e-6."),
    Promise(id="N04", says="A large KL beside a small NLL loses neither; both are logged in float64."),
    Promise(id="N05", says="Rows without a token to look at are refused or answered, never NaN."),
    Promise(id="N06", says="A GPU answers as the CPU does, in float32 and in bf16."),
    Promise(id="N07", says="Padding, batch and neighbours do not matter to a row."),
    Promise(id="N08", says="Compilation, checkpointing, attention kernels and quantised bases keep the draw."),
    Promise(id="N09", says="Weight decay spares M and G; who gets what is pinned."),
    Promise(id="P01", says="A saved posterior answers bit-equal in a fresh process."),
    Promise(id="P02", says="A save killed at any filesystem call leaves the old state or the new, whole."),
    Promise(id="P03", says="So do real kills at random times."),
    Promise(id="P04", says="Resuming skips broken checkpoints by name; the last good one is never removed."),
    Promise(id="P05", says="A resumed run is the uninterrupted one, bit for bit, wherever it stopped."),
    Promise(id="P06", says="A posterior for another base, or with other settings, is refused by name."),
    Promise(id="P07", says="A posterior is never lost by loading it as plain LoRA, nor made from plain LoRA."),
    Promise(id="P08", says="Bit flips, cuts and additions are refused before a tensor is used."),
    Promise(id="P09", says="No pickle is written or opened."),
    Promise(id="P10", says="Names that are paths, links that lead out, are refused before any write."),
    Promise(id="P11", says="Two writers of one folder: one is told; a reader never sees a mix."),
    Promise(id="P12", says="Folders of every released format load and answer as they did."),
    Promise(id="P13", says="The base model is never changed, also after exceptions."),
    Promise(id="D01", says="A malformed line is refused with file, line and field; nothing is dropped."),
    Promise(id="D02", says="A missing or mistyped label is refused; rows to predict need none."),
    Promise(id="D03", says="A label out of range is refused."),
    Promise(id="D04", says="Bad choices are refused."),
    Promise(id="D05", says="Empty texts are refused."),
    Promise(id="D06", says="A row that is too long is refused and counted, never cut."),
    Promise(id="D07", says="Text of any script round-trips; what cannot be written is refused."),
    Promise(id="D08", says="Repeated ids are refused; rows of train that are also scored are reported."),
    Promise(id="D09", says="The scored tokens are those of the prompt with its label, for every tokenizer."),
    Promise(id="D10", says="Tokenizers without a pad token, with added tokens or doubled BOS are handled or refused."),
    Promise(id="D11", says="One class, few rows, a last batch of one: trained and scored, or refused by name."),
    Promise(id="D12", says="Permuted labels permute the probabilities."),
    Promise(id="D13", says="Data that changes between two parts of a run stops it."),
    Promise(id="D14", says="The order of rows follows from the seed; results are keyed by id."),
    Promise(id="R01", says="Out of memory: smaller micro-batches, the same effective batch and result."),
    Promise(id="R02", says="A missing GPU is said before weights are loaded; a lost one leaves the last checkpoint."),
    Promise(id="R03", says="A full disk stops the run with what is needed; the last checkpoint stays whole."),
    Promise(id="R04", says="SIGINT and SIGTERM in any phase: exit 130 or 143, resumable."),
    Promise(id="R05", says="NaN stops before the update, and names step, part, rows and the last good checkpoint."),
    Promise(id="R06", says="Two processes train what one trains; the KL counts once."),
    Promise(id="R07", says="A dead process ends the run in time, and leaves a good checkpoint."),
    Promise(id="R08", says="Odd environments: no HOME, no terminal, C locale, read-only folders, odd paths."),
    Promise(id="R09", says="Exit codes, one line on stderr, JSON also for failures, no traceback."),
    Promise(id="R10", says="A result records all that made it, and can be made again from its record."),
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
        note="Bounded, not timed: a file of settings has at most 1 MiB of JSON in 64 levels or 16 KiB of YAML in 8 "
        "without references; ranks and lists have largest sizes; a regular expression in it has at most 256 "
        "characters, stars only after dots and at most three stars and groups, so longer ones must become "
        "lists of names.",
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
    Promise(id="K05", says="Training killed again and again ends where the undisturbed run ends."),
    Promise(id="K06", says="Draws nest; copies and pickles of a model have the same draws."),
)
