"""Translate the option names of the original implementation (docs/reference/original.md)."""

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
"""Every option of the original, and its name here."""

_BY_SPELLING = {
    f"--{spelled}": option
    for name, option in OPTIONS.items()
    for spelled in (name, name.replace("_", "-"))
}


def translate(arguments: Sequence[str]) -> list[str]:
    """Replace the original's option names by ours; leave all other arguments unchanged.

    A name is understood with underscores, as the original has it, and with dashes.
    """
    ours: list[str] = []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        option = _BY_SPELLING.get(name)
        if option is None:
            ours.append(argument)
        else:
            *flags, last = option.split()
            ours += [*flags, last + equals + value]
    return ours
