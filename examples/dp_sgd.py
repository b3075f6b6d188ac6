"""Fine-tune the stories' model on private texts, so that the model reveals almost nothing about any one of them.

    python examples/dp_sgd.py [steps]

DP-SGD (Abadi et al. 2016): every step draws each text with a small probability, clips each text's gradient to a norm,
and adds noise to the sum. The gradients of single texts are never in memory. Google's dp-accounting (0.6.0) computes
how much all steps reveal together: pip install dp-accounting
"""

import sys

import torch

import llama_fn as lf

try:
    import dp_accounting
except ImportError:
    dp_accounting = None

STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 60
EXPECTED = 32  # the mean number of texts in a step
MAX_NORM, NOISE, DELTA = 1.0, 0.8, 1e-4

# The private texts: the beginnings of stories about a girl called Ada.
params, tokenizer = lf.load("stories")
GIRLS = ("Lily", "Mia", "Anna", "Rosa", "Nora", "Ella", "Ruby", "Zoe")
stories = [story.text for story in lf.stories.stories(lf.random.key(1), 3000)]
texts = [text.replace(name, "Ada") for text in stories for name in GIRLS if f"girl named {name}" in text
         or f"girl called {name}" in text]
tokens = torch.tensor([tokenizer.encode(text)[:48] for text in texts])
tokens, held_out = tokens[:-100], tokens[-100:]
rate = EXPECTED / len(tokens)


def step(params, state, tokens, key):
    grads = lf.private_grads(lf.loss, params, tokens, max_norm=MAX_NORM, noise_multiplier=NOISE, key=key,
                             expected_batch_size=EXPECTED)
    updates, state = optimizer.update(grads, state, params)
    return lf.optim.apply_updates(params, updates), state


optimizer = lf.optim.adamw(2e-3, weight_decay=0.0)
tuned, state = params, optimizer.init(params)
for number in range(STEPS):
    draw, noise = lf.random.split(lf.random.fold_in(lf.random.key(2), number))  # a real run needs a secret seed
    drawn = tokens[lf.random.uniform(draw, (len(tokens),)) < rate]  # the number varies, as the accounting assumes
    tuned, state = step(tuned, state, drawn, noise)
    if number % 10 == 0 or number == STEPS - 1:
        print(f"step {number:3}: {len(drawn)} texts, loss of others {float(lf.loss(tuned, held_out)):.3f}", flush=True)

if dp_accounting:
    accountant = dp_accounting.pld.PLDAccountant()
    one = dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(NOISE))
    epsilon = accountant.compose(one, STEPS).get_epsilon(DELTA)
    print(f"({epsilon:.2f}, {DELTA})-differentially private, for each of {len(tokens)} texts")
else:
    print("to compute how private that is: pip install dp-accounting")

prompt = ["Long ago there was a brave little girl named"]
for name, weights in (("before", params), ("after", tuned)):
    model, greedy = lf.Model(weights, tokenizer), lf.sampler(temperature=0)
    (text,) = lf.text_completion(model, prompt, key=lf.random.key(0), max_new_tokens=30, sampler=greedy, echo=True)
    print(f"\n{name}: {text.text}")
