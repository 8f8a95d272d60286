"""A chat of several turns, against a server of either engine (see rag.py for starting one):

    python examples/chat.py --url http://localhost:8000

Every turn sends the whole chat so far. What was said before is not read again: the engine's own
cache has it, or lmc where the engine needed the memory for others or was restarted in between.
`--idle 30` waits between turns: restart the server meanwhile, and the chat goes on from disk.
"""

from __future__ import annotations

import argparse
import time

from client import Client

OPENING = (
    "A patient gardener explains to a beginner, at length and with many examples, how soil, water, "
    "light and time work together. "
)
TURNS = (
    "How do I begin with a small garden?",
    "Which tools do I need for that?",
    "And what can go wrong in the first year?",
    "Please sum up what you said.",
)


def main() -> None:
    parser = argparse.ArgumentParser(description="a chat of several turns")
    parser.add_argument("--url", default="http://localhost:8000")
    parser.add_argument("--opening", type=int, default=30, help="repeats of the opening")
    parser.add_argument("--tokens", type=int, default=48, help="tokens an answer")
    parser.add_argument("--idle", type=float, default=0, help="seconds between turns")
    options = parser.parse_args()
    client, chat = Client(options.url), OPENING * options.opening
    for number, question in enumerate(TURNS, 1):
        chat += f"\n\nUser: {question}\nGardener:"
        answer = client.complete(chat, max_tokens=options.tokens)
        chat += answer.text
        print(f"turn {number}: {answer}")
        if number < len(TURNS):
            time.sleep(options.idle)


if __name__ == "__main__":
    main()
