"""What users get wrong: each a command line, the files it is given, and the line that is read."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class BadInput:
    """One mistake.

    Attributes:
        name: the test's id.
        command: what follows `abft-fast`, in a folder of its own.
        says: parts of the one line, in their order.
        files: content by name, there before.
        made: folders of the fixture `made` that are there too.
        cut: files that lack their end.
        lost: files that are not there any more.
        locked: a folder that may not be written to.
        exit_code: 2 for the user's mistakes, 1 for failures.
        largest_file: bytes after which the disk is full.
        after_progress: whether lines of progress come first, as it is found late.
        grows: a log that tells of the attempt.
    """

    name: str
    command: str
    says: tuple[str, ...]
    files: Mapping[str, str | bytes] = field(default_factory=dict)
    made: tuple[str, ...] = ()
    cut: tuple[str, ...] = ()
    lost: tuple[str, ...] = ()
    locked: str | None = None
    exit_code: int = 2
    largest_file: int | None = None
    after_progress: bool = False
    grows: str | None = None


HEADER = "text,label\n"
ROWS = "".join(
    f"a {'dull' if i % 2 else 'warm'} film number {i},{'bad' if i % 2 else 'good'}\n"
    for i in range(40)
)
REVIEWS = {"reviews.csv": HEADER + ROWS}
PREDICT = "predict --demonstrations demos.csv --input queries.csv --output out.csv"
DEMONSTRATIONS = {"demos.csv": HEADER + "a delight,good\ntwo hours lost,bad\n"}
QUERIES = {"queries.csv": "id,text\n17,a quiet triumph\n18,the jokes fall flat\n"}
BOTH = {**DEMONSTRATIONS, **QUERIES}
LONG = "word " * 3000
QUICK = "train --dataset trec --k 2 --train-samples 8 --epochs 1 --no-eval --device cpu"
CHECKPOINT = "run/checkpoints/step-000001"


def reviews(name, content, *says, options=""):
    """A row on a file of one's own."""
    return BadInput(name, f"train --dataset reviews.csv {options}", says, {"reviews.csv": content})


def template(name, content, *says):
    """A row on a template for good data."""
    files = {**REVIEWS, "t.yaml": content}
    return BadInput(name, "train --dataset reviews.csv --template t.yaml", says, files)


def option(command, *says):
    """A row that needs no file."""
    return BadInput(command, command, says)


def yaml_file(name, content, *says):
    """A row on a file of options."""
    return BadInput(name, "train --config c.yaml", says, {"c.yaml": content})


def sweep(name, content, *says, options=""):
    """A row on a file of cells."""
    return BadInput(name, f"sweep s.yaml --output-dir out {options}", says, {"s.yaml": content})


def predict(name, changed, *says, options="", **more):
    """A row on files to be labelled."""
    return BadInput(name, f"{PREDICT} {options}", says, {**BOTH, **changed}, **more)


DATA = [
    reviews("empty-file", "", "reviews.csv is empty", "first row must name the columns"),
    reviews("header-only", HEADER, "reviews.csv has no rows"),
    reviews("missing-column", "text,lable\na,b\n", "row 1", "no column 'label'", "'lable'?"),
    reviews("wrong-encoding", (HEADER + ROWS).encode("utf-16"), "row 1: byte 0xff is not UTF-8",
            "save the file as UTF-8"),
    reviews("latin-1", (HEADER + ROWS).encode() + b"caf\xe9,good\n", "row 42: byte 0xe9"),
    reviews("ragged-row", HEADER + ROWS + "good, but long,good\n",
            "row 42: the row must have 2 cells, not 3",
            'put a text with a comma in it in "quotes"'),
    reviews("one-class", HEADER + "a,good\nb,good\n", "column 'label'",
            "every row has the label 'good'; two labels are needed"),
    reviews("empty-text", HEADER + ROWS + ",good\n", "row 42, column 'text': the text is empty",
            "leave the row out"),
    reviews("none-label", HEADER + ROWS + "a film,None\n", "row 42, column 'label'", "is None",
            "if None is a label, name it under `labels` in a --template"),
    reviews("nan-label", HEADER + ROWS + "a film,NaN\n", "row 42, column 'label'", "is NaN"),
    reviews("k-of-all-rows", HEADER + ROWS, "k=32: reviews has 32 training examples",
            "k is at most 31", options="--k 32"),
    BadInput("labels-of-one-row",
             "train --dataset r.csv --test-file t.csv --k 1 --seen-labels-only",
             ("no two training examples of r have the same label",),
             {"r.csv": HEADER + "a,one\nb,two\nc,three\n", "t.csv": HEADER + "d,one\n"}),
    option("train --method PICL --seen-labels-only", "--seen-labels-only", "plain text"),
    option("train --seen-labels-only --on-long-prompt fewer-demonstrations",
           "may leave out the one with the query's label", "use --on-long-prompt drop"),
    BadInput("all-training-texts-are-tested",
             "train --dataset t.csv --test-file u.csv --training-datasets o.csv --k 1",
             ("o: all of its texts to train on are also tested: name another dataset",),
             {"t.csv": HEADER + ROWS, "u.csv": HEADER + "same,good\nother,bad\n",
              "o.csv": HEADER + "same,good\nother,bad\n" * 5}, after_progress=True),
    reviews("test-is-training", HEADER + ROWS, "reviews.csv has the content of reviews.csv",
            "leave out --test-file", options="--test-file reviews.csv"),
    BadInput("broken-json-line", "train --dataset r.jsonl", ("r.jsonl, row 2, character 9", "JSON"),
             {"r.jsonl": '{"text": "a", "label": 1}\n{"text":\n'}),
    option("train --stream", "--stream", "--gradient full", "--gradient local or a number"),
    option("train --stream --gradient local --checkpointing", "--stream and --checkpointing"),
    option("train --stream-states disk", "--stream-states disk needs --stream"),
    option("train --pipeline", "--pipeline needs --stream"),
    option("train --stream --gradient local --pipeline-size 2", "--pipeline-size needs --pipeline"),
    option(
        "plan --model llama3-8b --stream --gradient local --pipeline --processes 3 "
        "--pipeline-size 2",
        "3 processes do not form pipelines of 2",
    ),
    option(
        "train --stream --gradient local --pipeline --stream-states disk", "--stream-states disk"
    ),
    option("plan --stream --gradient local --pipeline", "--pipeline and --processes"),
    option("plan --processes 2", "--pipeline and --processes"),
    option("plan --disk-bandwidth 2", "--disk-bandwidth works with --stream only"),
    option("plan --stream --gradient local --bus-bandwidth 0", "--bus-bandwidth 0"),
    option("train --dataset nowhere.csv", "nowhere.csv cannot be read: No such file"),
    option("train --dataset /dev/zero", "/dev/zero is a device: name a file, a pipe, or - for"),
    template("label-not-in-template", "labels: {Good: positive, bad: negative}\n",
             "reviews.csv, row 2, column 'label': 'good' is not among the labels of t.yaml",
             "did you mean 'Good'?"),
    template("label-in-no-row", "labels: {good: fine, bad: poor, so: so}\n", "no row has", "'so'"),
    template("duplicate-label-words", "labels:\n  good: fine\n  bad: fine\n",
             "t.yaml, row 3: labels 'good' and 'bad' have the same word, 'fine'"),
    template("label-word-of-several-tokens", "labels: {good: positive, bad: positively}\n",
             "label words are several tokens", "'positively'",
             "--label-token first and --prompt-form staicc would not help; "
             "use other words by --template or another model"),
    template("template-key", "label_prefx: 'x: '\n", "t.yaml, row 1: there is no key 'label_prefx'",
             "did you mean 'label_prefix'?"),
    template("template-list", "- labels\n", "t.yaml, row 1: the file must be a mapping"),
    template("template-null", "label_prefix: 'x: '\ninput_prefix: null\n",
             "t.yaml, row 2: input_prefix is null, which is no text in YAML", 'write ""'),
    template("template-null-word", "labels: {good: ~, bad: poor}\n",
             "t.yaml, row 1: label 'good' is ~, which is no text"),
    template("template-half-a-character", 'input_prefix: "\\ud83d"\n',
             r"t.yaml, row 1: input_prefix: \ud83d is half a character"),
    template("template-too-deep", "[" * 5000, "t.yaml cannot be read: it is nested too deeply"),
    BadInput("template-of-staicc", "train --dataset sst2 --template t.yaml",
             ("--template is for your own data", "leave the option out"), {"t.yaml": "{}"}),
    BadInput("templates-of-own-data", "eval --dataset reviews.csv --test-type TempSensitivity",
             ("--test-type TempSensitivity: reviews.csv has no alternate templates",), REVIEWS),
    BadInput("picl-empty-text", "train --method PICL --plain-text p.txt",
             ("--plain-text p.txt holds no text", "one paragraph a line"), {"p.txt": "\n \n"}),
    BadInput("picl-few-lines", "train --method PICL --plain-text p.txt",
             ("k=4: there are 2 paragraphs, so k is at most 1",), {"p.txt": "one\ntwo\n"}),
    BadInput("picl-encoding", "train --method PICL --plain-text p.txt",
             ("--plain-text p.txt: byte 0xff is not UTF-8",), {"p.txt": b"\xff\xfe"}),
    BadInput("mauve-few-prefixes", "train --mauve-test --mauve-prefix p.txt",
             ("--mauve-prefix p.txt: 1 prefixes are too few", "use 50 or more"), {"p.txt": "a\n"}),
]  # fmt: skip

OPTIONS = [
    option("tain", "No such command 'tain'. Did you mean 'train'?"),
    option("train --epocs 1", "No such option: --epocs", "--epochs"),
    option("train --dataset imdb", "dataset 'imdb' is unknown: use one of sst2"),
    option("train --dataset trek", "did you mean 'trec'?"),
    option("train --k 0", "--k 0: input should be greater than or equal to 1"),
    option("train --bits 5", "--bits 5: use 4 or 8"),
    option("train --bits 8", "--bits 8 needs --quantized"),
    option("train --seed 99999999999", "--seed 99999999999"),
    option("train --token-budget 0", "--token-budget 0: use auto or a number of tokens"),
    option("train --quantized --trainable full", "drop --quantized, or use --trainable lora"),
    option("train --method E2E --gradient local", "--gradient local works with ABFT only"),
    option("train --method ABTF", "--method ABTF: input should be", "did you mean 'ABFT'?"),
    option("train --method MetaICL --meta-datasets trec,subj", "holds subj, which is tested"),
    option("train --method MetaICL --meta-datasets trek", "dataset 'trek' is unknown", "'trec'?"),
    option("train --ICL_dataset_index 10", "dataset '10' is unknown", "an index 0-9"),
    option("train --self_adaption_loss PDI", "--adaptation pdi", "did you mean 'pid'?"),
    option("eval --test-type Gler", "--test-type Gler: 'Gler' is no test: use one or several",
           "'GLER'?"),
    option("eval --test-type GLER,GLER", "--test-type GLER,GLER: the test GLER is named twice"),
    option("eval --test-type Normal,", "'' is no test: use one or several, by commas, of Normal"),
    option("eval --test-type Normal,GLER --k 0", "--k 0: GLER changes demonstrations"),
    option("eval --test-type Normal,LabelFollowing --calibration batch",
           "--calibration batch is for the dataset's own label words"),
    option("eval --test-type GLER --k 0", "--k 0: GLER changes demonstrations"),
    option("eval --test-type GLER --k 6", "--k 6: GLER makes 0, 25, 50, 75 and 100 % of"),
    BadInput("output-is-the-config", "eval --config c.yaml --output c.yaml",
             ("--output c.yaml is a file that the command reads",), {"c.yaml": "k: 2\n"}),
    BadInput("output-is-the-model", "eval --model m.gguf --output m.gguf",
             ("--output m.gguf is a file that the command reads",), {"m.gguf": "GGUF"}),
    option("eval --output no/where.json", "--output no/where.json: folder no does not exist"),
    option("plan --gpu-memory 0", "--gpu-memory 0: input should be greater than 1"),
    option("plan --resume run", "--resume works with train only", "--config run/config.yaml"),
    option("plan --model synthetic:llama9-1b", "model synthetic:llama9-1b: there is no such shape"),
    option("train --k 2000", "k=2000: subj has 1024 training examples, so k is at most 1023"),
    option("eval --dataset fp --k 513", "k=513: fp has 512 demonstrations to draw from"),
    option("train --k 500", "longer than the model's context of 2048 tokens"),
    option("train --model no/such", "offline: model no/such is not in the local cache"),
    option("train --tracker wandb", "--tracker wandb is not installed"),
    option("train --resume nowhere", "--resume nowhere: the folder holds no run"),
    option("train --resume . --k 3", "--resume uses the run's own options", "--k"),
    option("train --layers 20-10", "--layers 20-10: use a layer, a range such as 10-20"),
    option("train --layers 0-x", "--layers 0-x: use a layer"),
    option("train --layers 3 --trainable model", "--layers works with --trainable lora and full"),
    option("merge --output-dir merged", "--adapter is missing"),
    *(option(f"analyze shift --adapter a {ignored}", f"No such option: {ignored.split()[0]}")
      for ignored in ("--k 4", "--dataset subj", "--prompt-form staicc", "--token-budget 9")),
    option("analyze path --label-token first", "--label-token first: path exchanges label words"),
    option("analyze cmap", "name the tuned model: --adapter FOLDER, or --tuned MODEL"),
    option("analyze cmap --adapter a --tuned b", "--adapter and --tuned both name the tuned model"),
    option("analyze cmap --adapter a --groups heads", "--groups heads: 'heads' is no group"),
    option("analyze cmap --adapter a --what outputs", "--what outputs", "did you mean 'output'?"),
    option("analyze attention --k 0", "--k 0: there are no labels to attend to"),
    option("analyze restrict --adapter a --heads 3", "--heads 3: use LAYER.HEAD"),
    option("analyze restrict --adapter a --heads 3.1 --top 4", "--heads and --top both choose"),
    option("analyze show --layers a", "--layers a: use a layer, a range"),
    option("analyze show --prompt-index 5000 --device cpu",
           "--prompt-index 5000: the test has the prompts 0 to 1023"),
    option("analyze plane --a . --e . --grid 1:0:5", "--grid 1:0:5: use LOWEST:HIGHEST:COUNT"),
    option("analyze plane --a a --e .", "--a a: there is no such folder: name a run"),
    yaml_file("config-key", "epoch: 3\n", "config c.yaml: there is no option 'epoch'", "'epochs'?"),
    yaml_file("config-value", "test_type: normal\n", "config c.yaml: --test-type normal",
              "did you mean 'Normal'?"),
    yaml_file("config-list", "- k\n", "config c.yaml must be a mapping of options, such as `k: 4`"),
    yaml_file("config-twice", "k: 4\nk: 5\n", "config c.yaml cannot be read: k is given twice"),
    yaml_file("config-twice-spelled", "lora-r: 8\nlora_r: 16\n", "config c.yaml: lora_r is given"),
    yaml_file("config-in-config", "config: b.yaml\n", "config works on the command line only"),
    yaml_file("config-broken", "k: [\n", "config c.yaml, row 2: expected the node content"),
    yaml_file("config-no-date", "lr: 2024-13-01\n", "config c.yaml cannot be read: month must be"),
    yaml_file("config-odd-tag", "k: !!timestamp x\n", "config c.yaml cannot be read: a value does"),
    yaml_file("config-empty-tag", "k: !!int\n", "config c.yaml cannot be read: a value does"),
    yaml_file("config-too-deep", "k: " + "[" * 5000, "config c.yaml cannot be read: it is nested"),
    yaml_file("config-nul", 'dataset: "a\\0.csv"\n', "--dataset", "no file can have this name"),
    yaml_file("config-half", 'dataset: "\\ud83d.csv"\n', "--dataset", "holds half a character"),
    sweep("sweep-set-no-date", "options: {k: 2}\n", "--set lr=2024-13-01: the value is not YAML",
          options="--set lr=2024-13-01"),
    option("train --config nowhere.yaml", "config nowhere.yaml does not exist"),
    sweep("sweep-set-twice", "options: {k: 2}\n", "--set seed is given twice: give a list",
          options="--set seed=1 --set seed=2"),
    sweep("sweep-model-twice", "options: {k: 2}\n", "--model and --set model set the same option",
          options="--model builtin --set model=b"),
    sweep("sweep-key", "grids: {}\n", "the file: there is no part grids; did you mean 'grid'?"),
    sweep("sweep-option", "options: {sede: 1}\n", "no option sede; did you mean 'seed'?"),
    sweep("sweep-method", "grid: {method: [ABFT, vanila]}\n",
          "sweep s.yaml: vanila: --method: there is no method vanila; did you mean 'vanilla'?"),
    sweep("sweep-list", "- ABFT\n", "config s.yaml must be a mapping"),
    sweep("sweep-empty", "", "sweep s.yaml is empty: it needs at least one of options"),
    sweep("sweep-no-cell", "grid: {seed: []}\n",
          "grid: seed must be a list of one value or more, such as [0]"),
    sweep("sweep-bad-cell", "grid: {k: [2, 4, -1]}\n", "sweep s.yaml: k=-1: --k -1"),
    option("sweep", "Missing argument 'FILE'"),
    option("sweep nowhere.yaml", "nowhere.yaml does not exist"),
    sweep("sweep-set", "options: {k: 2}\n", "--set: there is no option sede; did you mean 'seed'?",
          options="--set sede=1"),
    sweep("sweep-jobs", "options: {k: 2}\n", "--jobs 0: input should be greater",
          options="--jobs 0"),
    sweep("sweep-into-a-file", "options: {k: 2}\n", "output folder s.yaml is a file",
          options="--output-dir s.yaml"),
    sweep("sweep-gpus", "options: {k: 2}\n", "--cell-gpus works with --engine ray only",
          options="--cell-gpus 2"),
    option("table . --layout 3 --metric accuracy", "layout 3 always shows consistency"),
    option("table . --layout 5", "--layout 5: input should be '1', '2', '3', '4' or 'labels'"),
    option("table . --output no/where.md", "--output no/where.md: folder no does not exist"),
    option("table nowhere", "folder nowhere does not exist"),
    option("table .", "folder . holds no run: name the folder of a run"),
]  # fmt: skip

FILES = [
    option("train --model ./nowhere", "model folder ./nowhere does not exist"),
    BadInput("model-without-config", "train --model model", ("model holds no config.json",),
             made=("model",), lost=("model/config.json",)),
    BadInput("truncated-model", "train --model model", ("model/model.safetensors is damaged, ",
             "download it again"), made=("model",), cut=("model/model.safetensors",)),
    BadInput("pickled-model", "train --model pickled",
             ("pickled/pytorch_model.bin is a pickle", "use weights saved as safetensors"),
             made=("pickled",)),
    option("eval --adapter nowhere", "adapter nowhere holds no adapter_config.json"),
    BadInput("adapter-without-config", "eval --adapter adapter",
             ("adapter adapter holds no adapter_config.json",),
             made=("adapter",), lost=("adapter/adapter_config.json",)),
    BadInput("adapter-config", "eval --adapter adapter",
             ("PEFT did not write this adapter_config.json",),
             {"adapter/adapter_config.json": "{}"}, made=("adapter",)),
    BadInput("adapter-without-weights", "eval --adapter adapter",
             ("adapter adapter: the folder holds no adapter_model.safetensors",),
             made=("adapter",), lost=("adapter/adapter_model.safetensors",)),
    BadInput("truncated-adapter", "eval --adapter adapter",
             ("adapter/adapter_model.safetensors is damaged, ", "again"),
             made=("adapter",), cut=("adapter/adapter_model.safetensors",)),
    BadInput("pickled-adapter", "eval --adapter pickled-adapter",
             ("pickled-adapter/adapter_model.bin is a pickle", "safetensors"),
             made=("pickled-adapter",)),
    BadInput("adapter-of-another-model", "merge --adapter other --output-dir merged",
             ("adapter other does not fit the model: size mismatch",), made=("other",),
             after_progress=True),
    BadInput("adapter-of-another-base", "eval --model noised --adapter adapter --device cpu",
             ("adapter adapter was trained on builtin, and ", "noised has other weights",
              "use the model that it was trained on"), made=("noised", "adapter"),
             after_progress=True),
    *(
        BadInput(f"prompt-tuning-{command.split()[0]}", f"{command} --adapter prompts",
                 ("adapter prompts is of PEFT's kind PROMPT_TUNING", "such as LORA"),
                 BOTH, made=("prompts",))
        for command in ("eval", "merge --output-dir merged", PREDICT)
    ),
    BadInput("run-as-adapter", "eval --adapter run",
             ("adapter run holds no adapter_config.json: did you mean run/adapter?",),
             made=("run",)),
    BadInput("adapter-as-model", "train --model adapter",
             ("model folder adapter holds an adapter and no model", "give the folder with "
              "--adapter"), made=("adapter",)),
    BadInput("merge-coefficient", "merge --adapter adapter=two --output-dir merged",
             ("--adapter adapter=two: use FOLDER or FOLDER=NUMBER",), made=("adapter",)),
    BadInput("merge-into-a-folder", "merge --adapter adapter --output-dir adapter",
             ("output folder adapter exists: choose another --output-dir",), made=("adapter",)),
    BadInput("merge-below-a-file", "merge --adapter adapter --output-dir f/merged",
             ("output folder f/merged cannot be made: f is a file",), {"f": ""}, made=("adapter",)),
    BadInput("merge-pickled", "merge --adapter pickled-adapter --output-dir merged",
             ("adapter_model.bin is a pickle",), made=("pickled-adapter",)),
    BadInput("output-is-a-folder", "eval --output d", ("--output d is a folder: name a file",),
             {"d/x": ""}),
    BadInput("output-locked", "eval --output d/e.json",
             ("--output d/e.json: no permission to write in d",), {"d/x": ""}, locked="d"),
    BadInput("output-dir-locked", "train --output-dir d/run", ("output folder d/run",
             "no permission to write in d", "choose another --output-dir"),
             {"d/x": ""}, locked="d"),
    BadInput("output-dir-is-a-file", "train --output-dir f", ("output folder f is a file",),
             {"f": ""}),
    BadInput("output-dir-of-others", "train --output-dir d", ("output folder d is not empty",
             "choose another --output-dir"), {"d/thesis.tex": "years"}),
    BadInput("overwrite-of-others", "train --output-dir d --overwrite",
             ("d holds thesis.tex, which no run writes",), {"d/thesis.tex": "years"}),
    BadInput("resume-of-no-run", "train --resume d", ("--resume d: the folder holds no run",),
             {"d/x": ""}),
    BadInput("resume-old-config", "train --resume d", ("config.yaml lacks the option",),
             {"d/config.yaml": "k: 4\n"}),
    BadInput("resume-on-changed-data", "train --resume own",
             ("reviews.csv has changed since run own began", "start a new run with --config"),
             made=("own",)),
    BadInput("resume-on-other-data", "train --resume own --dataset other.csv",
             ("run own began with ", "reviews.csv, and ", "other.csv has another content",
              "give the same file"), {"other.csv": HEADER + ROWS.upper()}, made=("own",)),
    BadInput("resume-on-staicc", "train --resume run --dataset mr",
             ("--resume uses the run's own options: leave out --dataset",), made=("run",)),
    BadInput("resume-of-a-cut-checkpoint", "train --resume run",
             (f"checkpoint {CHECKPOINT} cannot be read", "delete it to continue"),
             made=("run",), cut=(f"{CHECKPOINT}/state.safetensors",), exit_code=1,
             after_progress=True, grows="run/run.log"),
    BadInput("resume-of-a-damaged-run", "train --resume run",
             ("run/evaluation.json is damaged", "start a new run with --config"),
             {"run/evaluation.json": "{"}, made=("run",)),
]  # fmt: skip

PREDICTION = [
    predict("queries-without-text", {"queries.csv": "id,review\n1,a\n"},
            "queries.csv, row 1: there is no column 'text'; the columns are 'id', 'review'"),
    predict("queries-short-row", {"queries.csv": "id,text,note\n1,a film\n2,b,x\n"},
            "queries.csv, row 2: the row must have 3 cells, not 2",
            "write a comma for each cell that is missing"),
    predict("queries-with-another-separator", {"queries.csv": "id^text\n1^a\n"},
            "queries.csv, row 1: there is no column 'text'; the columns are 'id^text'; a comma "
            "separates columns, unless --delimiter names another character"),
    predict("both-from-stdin", {}, "--input and --demonstrations are both -: name a file",
            options="--demonstrations - --input -"),
    predict("delimiter-of-two", {}, "--delimiter x;: use one character", options="--delimiter x;"),
    predict("queries-empty", {"queries.csv": ""}, "queries.csv is empty"),
    predict("demonstrations-without-labels", {"demos.csv": "text\na\n"},
            "demos.csv, row 1: there is no column 'label'"),
    predict("demonstrations-unlabelled", {"demos.csv": HEADER + "a,good\nb,\n"},
            "demos.csv, row 3, column 'label': the label is empty"),
    predict("demonstrations-column", {}, "did you mean 'label'?",
            options="--label-column lable"),
    predict("predict-template", {}, "none.yaml does not exist", options="--template none.yaml"),
    predict("predict-option", {}, "No such option: --k", options="--k 3"),
    predict("prediction-column", {"queries.csv": "text,prediction\na,b\n"},
            "has a column 'prediction', which the output adds: rename it"),
    predict("query-too-long", {"queries.csv": QUERIES["queries.csv"] + f"19,{LONG}\n"},
            "queries.csv, row 4", "--on-long-prompt drop", after_progress=True),
    predict("demonstrations-too-long", {"demos.csv": DEMONSTRATIONS["demos.csv"] + f"{LONG},bad\n"},
            "demos.csv: with its 3 demonstrations", "use fewer"),
    predict("output-is-the-input", {}, "--output queries.csv is a file that the command reads",
            options="--output queries.csv"),
    predict("output-suffix", {}, "--output out.txt: use a name that ends in .csv or .jsonl",
            options="--output out.txt"),
]  # fmt: skip

FULL_DISK = [
    BadInput("train-full-disk", f"{QUICK} --output-dir run",
             ("run/environment.json: File too large",),
             largest_file=100, exit_code=1, after_progress=True),
    BadInput("merge-full-disk", "merge --adapter adapter --output-dir merged",
             ("merged: File too large",), made=("adapter",), largest_file=300_000, exit_code=1,
             after_progress=True),
    BadInput("eval-full-disk", "eval --dataset reviews.csv --k 2 --output e.json",
             ("e.json: File too large",), REVIEWS, largest_file=50, exit_code=1,
             after_progress=True),
    predict("predict-full-disk", {"queries.csv": "text\n" + "a fine film\n" * 200},
            "out.csv: File too large", largest_file=4000, exit_code=1, after_progress=True),
]  # fmt: skip

BAD_INPUTS = [*DATA, *OPTIONS, *FILES, *PREDICTION, *FULL_DISK]
