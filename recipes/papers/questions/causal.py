"""What a decoder may look at: change one token of a text, and see at which places the prediction changes.

python causal.py
"""

import torch
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel

from alignkit.models.start import builtin_tokenizer

torch.manual_seed(0)
size = len(builtin_tokenizer())
decoder = GPT2LMHeadModel(GPT2Config(vocab_size=size, n_positions=64, n_embd=64, n_layer=2, n_head=2,
                                     bos_token_id=None, eos_token_id=None))
encoder = BertForMaskedLM(BertConfig(vocab_size=size, hidden_size=64, num_hidden_layers=2, num_attention_heads=2,
                                     intermediate_size=128, max_position_embeddings=64))
ids = builtin_tokenizer()("The plot was clever and the cast was superb.", return_tensors="pt").input_ids
other = ids.clone()
other[0, 5] = (ids[0, 5] + 1) % size
for name, model in (("GPT-2, a decoder", decoder.eval()), ("BERT, an encoder", encoder.eval())):
    with torch.no_grad():
        moved = (model(ids).logits - model(other).logits).abs().amax(-1)[0] > 1e-6
    print(f"{name}: token 5 is changed; predictions change at", moved.nonzero().flatten().tolist())
