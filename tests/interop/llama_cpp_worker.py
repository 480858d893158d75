"""Runs in an environment that has llama-cpp-python and nothing of ours: tokens, logits and greedy tokens of GGUF files.

Reads {"files": {name: path}, "prompt": text, "texts": [text], "count": n} as JSON from stdin, writes JSON to stdout.
"""

import json
import sys

import llama_cpp

F32 = 0  # of the key-value cache; f16 by default


def measure(path: str, prompt: str, texts: list[str], count: int) -> dict:
    model = llama_cpp.Llama(
        path, n_ctx=512, n_threads=1, logits_all=True, verbose=False, type_k=F32, type_v=F32, seed=0
    )
    tokens = model.tokenize(prompt.encode(), add_bos=True)
    model.eval(tokens)
    logits = model.scores[: len(tokens)].tolist()
    drawn: list[int] = []
    model.reset()
    for token in model.generate(tokens, temp=0.0, repeat_penalty=1.0):
        drawn.append(token)
        if len(drawn) == count or token == model.token_eos():
            break
    return {
        "texts": [model.tokenize(text.encode(), add_bos=True) for text in texts],
        "back": [model.detokenize(model.tokenize(text.encode(), add_bos=True)).decode() for text in texts],
        "eos": model.token_eos(),
        "logits": logits,
        "drawn": drawn,
    }


if __name__ == "__main__":
    task = json.load(sys.stdin)
    files = task.pop("files")
    found = {
        name: measure(path, task["prompt"], task["texts"], task["count"]) for name, path in files.items()
    }
    json.dump({"version": llama_cpp.__version__, "files": found}, sys.stdout)
