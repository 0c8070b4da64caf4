"""Train W_Q and W_K by the attention-behavior loss, in a training loop of your own.

Run: python examples/loss_in_your_own_loop.py [--steps 16] [--test-prompts 128]
"""

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from abft_fast import attention_behavior_loss, builtin_model_path, data, pack
from abft_fast.prompts import PromptEncoder


@torch.no_grad()
def accuracy(model, encoded):
    """Return the share of prompts whose own label word has the highest logit of all label words."""
    right = 0
    for prompt, label in zip(encoded.prompts, encoded.labels, strict=True):
        logits = model(torch.tensor([prompt.input_ids])).logits[0, -1]
        right += logits[encoded.label_ids].argmax().item() == label
    return right / len(encoded.labels)


parser = argparse.ArgumentParser()
parser.add_argument("--model", default=builtin_model_path(), help="any decoder of transformers")
parser.add_argument("--dataset", default="subj")
parser.add_argument("--steps", type=int, default=16)
parser.add_argument("--test-prompts", type=int, default=128)
options = parser.parse_args()

model = AutoModelForCausalLM.from_pretrained(options.model)
tokenizer = AutoTokenizer.from_pretrained(options.model)
dataset = data.load(options.dataset)
encoder = PromptEncoder(tokenizer, dataset)
training = encoder.encode(dataset.training_prompts(k=4, count=32 * options.steps, seed=0)).prompts
test = encoder.encode(dataset.test_prompts(k=4)[: options.test_prompts])
print(f"accuracy before {accuracy(model, test):.1%}")

model.requires_grad_(False)
names = ("q_proj.weight", "k_proj.weight")
learned = [p.requires_grad_() for name, p in model.named_parameters() if name.endswith(names)]
optimizer = torch.optim.Adam(learned, lr=1e-3)  # for the built-in model; the paper's is 2e-5
for step in range(options.steps):
    packed = pack(training[32 * step : 32 * step + 32])
    behavior = attention_behavior_loss(model, packed, penalty=0.5, reward=1.0, gradient="full")
    behavior.loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    found = behavior.is_induction
    heads = found.sum().item() / len(packed)
    share = (behavior.correct_mass[found].sum() / behavior.label_mass[found].sum()).item()
    print(f"step {step}  loss {behavior.loss:.3f}  heads {heads:.2f}  correct share {share:.1%}")
print(f"accuracy after {accuracy(model, test):.1%}")
