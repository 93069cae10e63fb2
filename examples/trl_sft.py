"""TRL's SFTTrainer on chat rows, whose adapter is averaged with other sites': one argument more than it had.

    pip install trl
    python examples/trl_sft.py MODEL ROWS PEER.yaml IDENTITY MEMBERS OUT

MODEL is a hub id or a local folder with a chat template, ROWS a JSONL file with `messages`.  PEER.yaml, IDENTITY and
MEMBERS are as of `peerlora peer`; start it at all sites at the same time.
"""

import sys

from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from peerlora.hf import PeerCallback


def main(source: str, rows: str, config: str, identity: str, members: str, out: str, *words: str):
    callback = PeerCallback(config, identity, members)  # in it: how often, with whom, by which method
    settings = dict(word.split("=") for word in words)
    trainer = SFTTrainer(
        model=get_peft_model(
            AutoModelForCausalLM.from_pretrained(source), LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8)
        ),
        args=SFTConfig(
            out,
            max_steps=int(settings.get("steps", 300)),
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            learning_rate=1e-3,
            logging_steps=1,
            save_strategy=settings.get("save", "epoch"),
            report_to="none",
            use_cpu="cpu" in settings,
            bf16=False,
        ),
        train_dataset=load_dataset("json", data_files=rows, split="train"),
        processing_class=AutoTokenizer.from_pretrained(source),
        callbacks=[callback],  # the only line that a federation needs
    )
    trainer.train()
    if callback.result:  # of several processes, the first one has it
        print(f"{callback.result.summary['rounds']} rounds, the adapter is in {callback.result.run / 'adapters'}")


if __name__ == "__main__":
    main(*sys.argv[1:])
