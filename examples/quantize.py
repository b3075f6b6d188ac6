"""What eight and four bits cost: errors of the logits, bits a byte and bytes, of the shipped model or of yours.

    python examples/quantize.py [MODEL] [TEXTS]

Without TEXTS (a file or a folder) it reads 100 new stories. To train a model on 90 % of tiny-shakespeare and measure it
on the rest:

    head -c 1003854 tinyshakespeare.txt > train.txt; tail -c +1003855 tinyshakespeare.txt > rest.txt
    llama-fn train train.txt --out shakespeare --dim 128 --n-layers 4 --n-heads 4 --n-kv-heads 2 --hidden-dim 256 \\
        --vocab-size 512 --context 64 --batch 16 --steps 2000
    python examples/quantize.py shakespeare rest.txt
"""

import sys

import torch

import llama_fn as lf
from llama_fn.generation.perplexity import Perplexity
from llama_fn.training.texts import read_texts

name = sys.argv[1] if len(sys.argv) > 1 else "stories"
stories = (story.text for story in lf.stories.stories(lf.random.key(100), 100))
texts = list(read_texts(sys.argv[2]) if len(sys.argv) > 2 else stories)

exact = lf.load(name, dtype=torch.float32)
pieces = [torch.tensor(exact.tokenizer.encode(text)).split(exact.params.config.max_seq_len) for text in texts]
rows = sum(pieces, ())[:1000]
print(f"{'':<8}  largest error  mean error  bits a byte  perplexity       bytes")
with torch.no_grad():
    expected = [lf.forward(exact.params, row)[0] for row in rows]
    for bits in ("float32", "int8", "int4"):
        model = exact if bits == "float32" else exact._replace(params=lf.quantize(exact.params, bits))
        wrong = torch.cat([lf.forward(model.params, row)[0] - x for row, x in zip(rows, expected, strict=True)]).abs()
        score = Perplexity(*map(sum, zip(*(lf.perplexity(model, text) for text in texts), strict=True)))
        size = sum(x.nbytes for x in lf.tree.leaves(model.params))
        print(f"{bits:<8}  {wrong.max():13.4f}  {wrong.mean():10.4f}  {score.bits_per_byte:11.4f}"
              f"  {score.perplexity:10.4f}  {size:10,}")
print(f"logits of {sum(map(len, rows)):,} tokens, whose deviation is {torch.cat(expected).std():.2f}; "
      f"bits a byte of {score.bytes:,} bytes")
