"""Read the option names of the original implementation; docs/reference/original.md lists them."""

from __future__ import annotations

from collections.abc import Sequence

OPTIONS = {
    "ICL_model_name": "--model",
    "ICL_dataset_index": "--dataset",
    "method": "--method",
    "ICL_k": "--k",
    "quantized": "--quantized",
    "correct_label_award": "--reward",
    "wrong_label_penalty": "--penalty",
    "train_sample_num": "--train-samples",
    "lr": "--lr",
    "pseudo_batch_size": "--pseudo-batch-size",
    "epoch": "--epochs",
    "random_seed": "--seed",
    "no_fore_test": "--no-eval-before",
    "no_post_test": "--no-eval-after",
    "test_type": "--test-type",
    "generalization_test": "--generalization-test",
    "dont_save_model": "--no-save",
    "restricted_gradient": "--gradient local",
    "self_adaption_loss": "--adaptation",
    "loss_adaption_factor_for_P": "--p-factor",
    "PID_param_P": "--pid-p",
    "PID_param_I": "--pid-i",
    "PID_param_D": "--pid-d",
    "lora_r": "--lora-r",
    "MAUVE_test": "--mauve-test",
    "MAUVE_prefix": "--mauve-prefix",
}
"""Every option of the original, and what it is here."""


def translate(arguments: Sequence[str]) -> list[str]:
    """Arguments with the original's option names replaced by ours; all others as they are."""
    found: list[str] = []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        ours = OPTIONS.get(name.removeprefix("--")) if name.startswith("--") else None
        if ours is None:
            found.append(argument)
        else:
            *flags, last = ours.split()
            found += [*flags, last + equals + value]
    return found
