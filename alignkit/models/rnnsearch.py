"""RNNsearch and its fixed-vector rival RNNencdec (Bahdanau et al. 2014, arXiv 1409.0473) as a model of transformers.

Importing the module registers `model_type: rnnsearch` with AutoConfig and AutoModelForSeq2SeqLM.

Legend: B rows, S source and T target tokens, n size of a hidden state, m of an embedding. Letters such as W_a are the
paper's, appendix A; it leaves out the biases, and so do we in comments.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSeq2SeqLM, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput


class RnnSearchConfig(PreTrainedConfig):
    """Sizes; the paper's are 1000, 620, 1000 and 500. Without `attention` it is RNNencdec."""

    model_type = "rnnsearch"
    vocab_size: int = 512  # one vocabulary for both languages, where the paper has two
    hidden_size: int = 96  # n
    embedding_size: int = 64  # m
    alignment_size: int = 96  # n'
    maxout_size: int = 48  # l
    attention: bool = True
    # 0.01 is the paper's, with 0.001 in the alignment model and v_a = 0: at its sizes. A hundred units never leave the
    # plateau of uniform weights so (1.7 nats a token on builtin:translation after 4 passes, against 0.002). None: every
    # layer by its number of inputs, as PyTorch does.
    initializer_range: float | None = None
    pad_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 1
    decoder_start_token_id: int | None = 0
    is_encoder_decoder: bool = True
    tie_word_embeddings: bool = False


class GatedUnit(nn.Module):
    """The gated hidden unit of A.1.1: the reset gate acts on the state before its product, as in no nn.GRU."""

    def __init__(self, input_size: int, size: int) -> None:
        super().__init__()
        self.inputs = nn.Linear(input_size, 3 * size)  # W, W_z, W_r
        self.gates = nn.Linear(size, 2 * size, bias=False)  # U_z, U_r
        self.candidate = nn.Linear(size, size, bias=False)  # U

    def forward(self, given_B3n: Tensor, state_Bn: Tensor) -> Tensor:
        """Make the next state; `given` is all that is added inside the three brackets beside the state."""
        given, given_z, given_r = given_B3n.chunk(3, dim=-1)
        from_z, from_r = self.gates(state_Bn).chunk(2, dim=-1)
        z, r = torch.sigmoid(given_z + from_z), torch.sigmoid(given_r + from_r)
        return (1 - z) * state_Bn + z * torch.tanh(given + self.candidate(r * state_Bn))


class Encoder(nn.Module):
    """Bidirectional encoder (A.2.1): annotations h_j = [forward; backward] over one embedding."""

    main_input_name = "input_ids"

    def __init__(self, config: RnnSearchConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.vocab_size, config.embedding_size)
        self.forwards = GatedUnit(config.embedding_size, config.hidden_size)
        self.backwards = GatedUnit(config.embedding_size, config.hidden_size)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any) -> BaseModelOutput:
        """Encode sources, (B, S) to (B, S, 2n); a state passes padding unchanged."""
        embedded, sides = self.embedding(input_ids), []
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        mask_BS1, steps = mask.unsqueeze(-1).to(embedded.dtype), range(embedded.size(1))
        for unit, order in ((self.forwards, steps), (self.backwards, reversed(steps))):
            given_BS3n = unit.inputs(embedded)
            state = embedded.new_zeros(embedded.size(0), unit.candidate.in_features)
            states = [state] * len(steps)
            for j in order:
                states[j] = state = torch.lerp(state, unit(given_BS3n[:, j], state), mask_BS1[:, j])
            sides.append(torch.stack(states, dim=1))
        return BaseModelOutput(last_hidden_state=torch.cat(sides, dim=-1))


class Decoder(nn.Module):
    """Decoder with its alignment model (A.1.2, A.2.2); without attention all are [last forward, first back]."""

    def __init__(self, config: RnnSearchConfig) -> None:
        super().__init__()
        n, m = config.hidden_size, config.embedding_size
        self.has_attention = config.attention
        self.embedding = nn.Embedding(config.vocab_size, m)
        self.start = nn.Linear(n, n)  # W_s
        self.unit = GatedUnit(m, n)
        self.contexts = nn.Linear(2 * n, 3 * n, bias=False)  # C, C_z, C_r
        if config.attention:
            self.query = nn.Linear(n, config.alignment_size, bias=False)  # W_a
            self.key = nn.Linear(2 * n, config.alignment_size)  # U_a
            self.energy = nn.Linear(config.alignment_size, 1, bias=False)  # v_a
        # t~ = U_o s_{i-1} + V_o E y_{i-1} + C_o c_i: the state before y_i, as A.2.2 and the authors' code (GroundHog)
        # have it; equation 4 says s_i.
        self.readout = nn.Linear(n + m + 2 * n, 2 * config.maxout_size)

    def attend(self, state_Bn: Tensor, keys: Tensor, annotations: Tensor, mask_BS: Tensor) -> tuple[Tensor, Tensor]:
        """Weigh the annotations by softmax_j v_a tanh(W_a s_{i-1} + U_a h_j): context (B, 2n), weights (B, S)."""
        energies_BS = self.energy(torch.tanh(self.query(state_Bn).unsqueeze(1) + keys)).squeeze(-1)
        weights_BS = energies_BS.masked_fill(mask_BS == 0, -torch.inf).softmax(dim=-1)
        return torch.bmm(weights_BS.unsqueeze(1), annotations).squeeze(1), weights_BS

    def forward(
        self, target_BT: Tensor, annotations: Tensor, mask_BS: Tensor, state_Bn: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Read the target: readouts (B, T, l), the state after it, and the weights (B, T, S)."""
        size = annotations.size(-1) // 2
        if state_Bn is None:
            state_Bn = torch.tanh(self.start(annotations[:, 0, size:]))
        context = torch.cat([annotations[:, -1, :size], annotations[:, 0, size:]], dim=-1)
        keys = self.key(annotations) if self.has_attention else None  # once for all i
        embedded = self.embedding(target_BT)
        given_BT3n = self.unit.inputs(embedded)
        states, contexts, weights = [], [], []
        for i in range(target_BT.size(1)):
            if keys is not None:
                context, weights_BS = self.attend(state_Bn, keys, annotations, mask_BS)
                weights.append(weights_BS)
            states.append(state_Bn)
            contexts.append(context)
            state_Bn = self.unit(given_BT3n[:, i] + self.contexts(context), state_Bn)
        read = torch.cat([torch.stack(states, dim=1), embedded, torch.stack(contexts, dim=1)], dim=-1)
        maxout = self.readout(read).unflatten(-1, (-1, 2)).amax(dim=-1)
        return maxout, state_Bn, torch.stack(weights, dim=1) if weights else None


class RnnSearchForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """The whole model as one of transformers' encoder-decoders; its cache is the decoder's state, (B, n)."""

    config_class = RnnSearchConfig
    main_input_name = "input_ids"
    _supports_attention_backend = False

    def __init__(self, config: RnnSearchConfig) -> None:
        super().__init__(config)
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.lm_head = nn.Linear(config.maxout_size, config.vocab_size)  # W_o
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Draw weights as B.1 does: recurrent ones orthogonal, the others from normal distributions, no biases."""
        std = self.config.initializer_range
        if isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=std or 1.0)
        if isinstance(module, nn.Linear):
            is_alignment = module in (getattr(self.decoder, "query", None), getattr(self.decoder, "key", None))
            scale = std * (0.1 if is_alignment else 1) if std else (3 * module.in_features) ** -0.5
            init.normal_(module.weight, std=scale)
            if module.bias is not None:
                init.zeros_(module.bias)
        if isinstance(module, GatedUnit):  # after its own layers, which are drawn first
            init.orthogonal_(module.candidate.weight)
            for part in module.gates.weight.chunk(2):
                init.orthogonal_(part)
        if isinstance(module, Decoder) and module.has_attention and std:
            init.zeros_(module.energy.weight)

    def get_encoder(self, *_: Any, **__: Any) -> Encoder:
        return self.encoder

    def get_input_embeddings(self) -> nn.Embedding:
        return self.encoder.embedding

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    @staticmethod
    def _reorder_cache(past_key_values: Tensor, beam_idx: Tensor) -> Tensor:
        return past_key_values.index_select(0, beam_idx.to(past_key_values.device))

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, past_key_values: Tensor | None = None, **inputs: Any
    ) -> dict[str, Any]:
        names = {"attention_mask", "encoder_outputs", "use_cache", "output_attentions"} & inputs.keys()
        target = input_ids if past_key_values is None else input_ids[:, -1:]
        return {"decoder_input_ids": target, "past_key_values": past_key_values, **{n: inputs[n] for n in names}}

    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None, encoder_outputs: Any = None, past_key_values: Tensor | None = None,
        labels: Tensor | None = None, use_cache: bool | None = None, output_attentions: bool | None = None,
        return_dict: bool | None = None, **_: Any,
    ) -> Seq2SeqLMOutput:  # fmt: skip
        """Give the logits of each target token, (B, T, V); with `labels` also their mean loss."""
        if encoder_outputs is None:
            encoder_outputs = self.encoder(input_ids, attention_mask)
        annotations = encoder_outputs[0]
        mask_BS = annotations.new_ones(annotations.shape[:2]) if attention_mask is None else attention_mask
        if decoder_input_ids is None:
            assert labels is not None, "give decoder_input_ids or labels"
            shifted = nn.functional.pad(labels[:, :-1], (1, 0), value=self.config.decoder_start_token_id)
            decoder_input_ids = shifted.masked_fill(shifted == -100, self.config.pad_token_id)
        hidden, state, weights = self.decoder(decoder_input_ids, annotations, mask_BS, past_key_values)
        logits = self.lm_head(hidden)
        loss = None if labels is None else nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return Seq2SeqLMOutput(
            loss=loss, logits=logits, past_key_values=state if use_cache else None,
            cross_attentions=(weights.unsqueeze(1),) if weights is not None and output_attentions else None,
            encoder_last_hidden_state=annotations,
        )  # fmt: skip


AutoConfig.register(RnnSearchConfig.model_type, RnnSearchConfig, exist_ok=True)
AutoModelForSeq2SeqLM.register(RnnSearchConfig, RnnSearchForConditionalGeneration, exist_ok=True)
