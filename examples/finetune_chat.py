"""Fine-tune on chats, then on preferences, by `torch.func.grad`; only a LoRA adapter is trained.

    python examples/finetune_chat.py [FOLDER]

The loss counts the answers alone. Then `lf.dpo_loss` compares two trees, the policy and the model that it began as.
With FOLDER, the adapter is written there as PEFT does. On the command line: `llama-fn finetune MODEL chats.jsonl`.
"""

import sys

import torch
from torch.nn.utils.rnn import pad_sequence

import llama_fn as lf

model = lf.load("stories")
params, tokenizer = model
names = ("Lily", "Mia", "Anna", "Rosa", "Nora", "Ella", "Ruby", "Zoe")


def dialog(name: str, answer: str) -> list[lf.Message]:
    """A chat about a name, as a model reads it in LLaMA 2's format."""
    return [{"role": "user", "content": f"Who is {name}?"}, {"role": "assistant", "content": answer}]


def batch(dialogs: list[list[lf.Message]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and masks, padded to one length. A mask is true at the answer and at the token that ends it."""
    tokens, masks = zip(*(lf.dialog_tokens(tokenizer, each) for each in dialogs), strict=True)
    return pad_sequence(tokens, batch_first=True), pad_sequence(masks, batch_first=True)


def trained(loss, adapter: lf.lora.Lora, steps: int, rate: float, what: str) -> lf.lora.Lora:
    """The adapter after some steps. Nothing is changed in place, and the model is not copied."""
    optimizer = lf.optim.chain(lf.optim.clip_by_global_norm(1.0), lf.optim.adamw(rate, weight_decay=0.0))
    state = optimizer.init(adapter)
    for step in range(steps):
        grads, nats = torch.func.grad_and_value(loss)(adapter)
        updates, state = optimizer.update(grads, state, adapter)
        adapter = lf.optim.apply_updates(adapter, updates)
        if step % 10 == 0 or step == steps - 1:
            print(f"{what}, step {step:2}: loss {float(nats):.3f}")
    return adapter


def told(adapter: lf.lora.Lora) -> str:
    """The likeliest answer about somebody who is in no chat."""
    answers = lf.chat_completion(lf.Model(lf.lora.apply(params, adapter), tokenizer), [dialog("Tom", "")[:1]],
                                 key=lf.random.key(0), max_new_tokens=24, sampler=lf.sampler(0.0))
    return answers[0].text.strip()


# First the chats themselves: an adapter of every matrix of a layer, and the loss on the answers.
tokens, mask = batch([dialog(name, f"{name} is a brave little girl.") for name in names])
start = lf.lora.init(lf.random.key(0), params, rank=8, targets=lf.lora.LINEAR)
tuned = trained(lambda a: lf.loss(lf.lora.apply(params, a), tokens, mask), start, 50, 1e-2, "chats")
print("after the chats:", told(tuned))

# Then preferences: the same questions, with a better and a worse answer. The reference is the model after the chats.
chosen = batch([dialog(name, f"{name} is a kind old owl.") for name in names])
rejected = batch([dialog(name, f"{name} is a brave little girl.") for name in names])
reference = lf.lora.apply(params, tuned)
preferring = trained(lambda a: lf.dpo_loss(lf.lora.apply(params, a), reference, chosen, rejected, beta=0.1), tuned, 11,
                     1e-3, "preferences")
for name, adapter in (("before", tuned), ("after", preferring)):
    (better, _), (worse, _) = (lf.loss_sum(lf.lora.apply(params, adapter), *rows) for rows in (chosen, rejected))
    print(f"{name}: log p(chosen) - log p(rejected) = {float(worse - better) / len(names):.1f}")

if len(sys.argv) > 1:
    lf.lora.save(preferring, sys.argv[1], params)
    print(f"llama-fn generate --adapter {sys.argv[1]}")
