"""Questions about documents, against a server of either engine:

    vllm serve MODEL --kv-offloading-backend lmc --enable-prompt-tokens-details
    LMC_ENABLE=1 python -m sglang.launch_server --model-path MODEL --enable-cache-report

    python examples/rag.py --url http://localhost:8000 README.md CHANGELOG.md

Each document is warmed: read once, with an answer of one token. Then every question about it starts
with the document, so its KV comes back and only the question is read. Started again later, or after
the server was restarted on the same LMC_TIERS folder, the warming is a hit as well.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from client import Client

QUESTIONS = (
    "In one sentence, what is this document about?",
    "Which numbers does it name?",
    "What should a reader do first?",
)


def prompt_of(document: str, question: str = "") -> str:
    """The shared part comes first, and is the same to the last character."""
    text = f"Document:\n{document}\n\n"
    return text + (f"Question: {question}\nAnswer:" if question else "")


def main() -> None:
    parser = argparse.ArgumentParser(description="documents warmed, questions follow")
    parser.add_argument("--url", default="http://localhost:8000")
    parser.add_argument("--characters", type=int, default=6000, help="read of each document")
    parser.add_argument("documents", nargs="+", type=Path)
    options = parser.parse_args()
    client = Client(options.url)
    documents = [path.read_text()[: options.characters] for path in options.documents]
    for path, document in zip(options.documents, documents, strict=True):
        print(f"warm      {path}: {client.complete(prompt_of(document), max_tokens=1)}")
    for question in QUESTIONS:
        print(f"\n{question}")
        for path, document in zip(options.documents, documents, strict=True):
            answer = client.complete(prompt_of(document, question), max_tokens=24)
            print(f"question  {path}: {answer}\n          {answer.text.strip()!r}")


if __name__ == "__main__":
    main()
