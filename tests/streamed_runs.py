"""One run of training and tests in two ways: on a whole model, and block by block."""

import dataclasses

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from abft_fast.evaluation.inference import predict_labels
from abft_fast.models import loading, trainable
from abft_fast.models.base_identity import base_of_adapter, describe_base
from abft_fast.options import TrainConfig
from abft_fast.options.resolve import resolve
from abft_fast.prompts import EncodedPrompts
from abft_fast.runtime.progress import Progress
from abft_fast.streaming.checkpoint import WalkCheckpoint
from abft_fast.streaming.model import StreamedModel
from abft_fast.streaming.stages import AttentionCheck, BaseIdentity, Evaluating
from abft_fast.streaming.steps import TrainingSteps
from abft_fast.streaming.walk import Walk
from abft_fast.training.loop import Training, optimize
from abft_fast.training.run_folder import RunFolder
from tests.close import close
from tests.tiny_models import tiny_model
from tests.unit.test_training import make_prompts

LABELS = [5, 11, 60]
OPTIONS = {
    "train_samples": 12, "epochs": 2, "pseudo_batch_size": 5, "head_filter": False,
    "token_budget": 90, "lr": 1e-2, "lora_r": 4, "save_steps": 1, "device": "cpu",
}  # fmt: skip


@dataclasses.dataclass
class Questions:
    """What `Evaluating` uses of an `EvaluationSet`."""

    encoded: list
    dataset: str = "questions"

    def run(self, predict):
        logits, behavior = predict(self.encoded[0], True)
        return logits, behavior.result()


def questions():
    prompts = make_prompts(9, seed=1)
    return Questions([EncodedPrompts(prompts, [0] * 9, list(range(9)), LABELS)])


def saved(family, tmp_path, **changes):
    model = tiny_model(family, **changes)
    model.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def config_of(model, **options):
    return resolve(TrainConfig, {**OPTIONS, "model": model, **options})


def training_of(config, model, folder):
    folder.mkdir(exist_ok=True)
    accelerator = Accelerator(cpu=True)
    return Training(config, RunFolder(folder), model, make_prompts(12), accelerator, Progress())


def resident(config, folder):
    """Metrics rows, logits before and after, and trained tensors of an ordinary run."""
    bits = config.bits if config.quantized else None
    model = loading.load(config.model, torch.device("cpu"), torch.float32, bits)
    base = describe_base(model, config.model)
    set_seed(config.seed)
    model = trainable.set_trained(model, config.trainable, config.lora_r)
    training = training_of(config, model, folder)
    encoded = questions().encoded[0]
    before, _ = predict_labels(model, encoded, config.token_budget)
    optimize(training)
    after, heads = predict_labels(model, encoded, config.token_budget)
    trainable.save_adapter(model, folder / "adapter", base)
    return training.run.metrics(), before, after, heads.result()


class Streamed:
    """The same by a walk."""

    def __init__(self, config, folder, states=None, size=None, checkpoints=True):
        bits = config.bits if config.quantized else None
        shape = loading.read_config(config.model)
        self.model = StreamedModel(config.model, shape, torch.device("cpu"), torch.float32, bits)
        training = training_of(config, self.model.model, folder)
        place = self.model, training.accelerator
        self.tests = [Evaluating(*place, [questions()], config.token_budget, "auto") for _ in "ba"]
        self.steps = TrainingSteps(self.model, training)
        self.identity = BaseIdentity(*place, training.progress)
        check = AttentionCheck(*place, training.prompts, "auto", training.progress)
        stages = [self.identity, check, self.tests[0], self.steps, self.tests[1]]
        self.checkpoint = WalkCheckpoint(folder / "checkpoints", 1) if checkpoints else None
        size = {"local": 1}.get(config.gradient, config.gradient)
        self.walk = Walk(self.model, stages, size, states, self.checkpoint)
        self.walk.read_outside(LABELS)
        set_seed(config.seed)
        self.model.set_trained(config.trainable, config.lora_r)
        training.model = self.model.model
        self.folder = folder

    def run(self):
        self.walk.run(Progress(), "walk")
        self.checkpoint.trained.put_back(self.model, self.walk.blocks)
        trainable.save_adapter(self.model.model, self.folder / "adapter", self.identity.base)
        (before, _), (after, heads) = (test.outcomes()[0][1] for test in self.tests)
        return self.steps.metrics(), before, after, heads


def evaluated(config, adapter):
    """Logits and heads of a walk that trains nothing, with an adapter."""
    model = StreamedModel(
        config.model, loading.read_config(config.model), torch.device("cpu"), torch.float32, None
    )
    progress = Progress()
    place = model, Accelerator(cpu=True)
    identity = BaseIdentity(*place, progress, base_of_adapter(adapter), "the adapter")
    evaluating = Evaluating(*place, [questions()], config.token_budget, "auto")
    walk = Walk(model, [identity, evaluating], 1)
    walk.read_outside(LABELS)
    model.load_adapter(adapter, progress.say)
    walk.run(progress, "evaluating")
    return evaluating.outcomes()[0][1]


def adapter_bytes(folder):
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


def same_logits(found, expected):
    """Their rounding errors are relative to the terms of a sum, and so to the largest logits."""
    assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()


def same_figures(streamed, ordinary):
    """Metrics rows, logits and heads of both ways differ by the order of sums."""
    names = ("loss", "penalty", "induction_heads", "correct_share_above_chance", "gradient_norm")
    for one, other in zip(streamed[0], ordinary[0], strict=True):
        for name in names:
            assert one[name] == close(other[name], rel=1e-6), name
    for side in (1, 2):
        same_logits(streamed[side], ordinary[side])
    heads = zip(dataclasses.astuple(streamed[3]), dataclasses.astuple(ordinary[3]), strict=True)
    assert all(one == close(other, rel=1e-6) for one, other in heads)
