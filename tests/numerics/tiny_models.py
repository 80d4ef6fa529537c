"""Tiny random models (at most 100,000 parameters, no dropout) and their tokenizers, saved as Hugging Face folders."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    BertForPreTraining,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

POSITIONS = 160
SENTINELS = 20
MAX_PARAMETERS = 100_000


def wordpiece(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """BERT's: WordPiece, [CLS] A [SEP] B [SEP], token types."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    splitter: Any = pre_tokenizers.BertPreTokenizer()
    counts = Counter(word for text in texts for word, _ in splitter.pre_tokenize_str(text))
    letters = sorted({letter for word in counts for letter in word})
    words = sorted((word for word in counts if len(word) > 1), key=lambda word: (-counts[word], word))
    # the library's own trainer breaks ties by chance, and the golden losses with them
    pieces = [*special, *letters, *(f"##{letter}" for letter in letters), *words]
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(pieces[:160]))}
    tokenizer: Any = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))  # pyright: ignore[reportCallIssue]
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.WordPiece()
    cls, sep = (tokenizer.token_to_id(token) for token in ("[CLS]", "[SEP]"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[("[CLS]", cls), ("[SEP]", sep)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        model_max_length=POSITIONS,
    )


def byte_bpe(texts: Iterable[str], special: list[str], *, appends_eos: bool) -> PreTrainedTokenizerFast:
    """Byte-level BPE; `special` begins with the pad and the eos token. As T5's and BART's it may append eos."""
    tokenizer: Any = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=256 + len(special) + 40,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    pad, eos = special[:2]
    if appends_eos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"$A {eos}", pair=f"$A {eos} $B {eos}", special_tokens=[(eos, tokenizer.token_to_id(eos))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=pad,
        eos_token=eos,
        additional_special_tokens=special[2:],
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


def chatml_bpe(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    return byte_bpe(texts, ["<|pad|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"], appends_eos=False)


def sentinel_bpe(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    sentinels = [f"<extra_id_{i}>" for i in range(SENTINELS)]
    return byte_bpe(texts, ["<pad>", "</s>", *sentinels], appends_eos=True)


def _bert(vocabulary: int, **head: Any) -> BertConfig:
    return BertConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=POSITIONS,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        **head,
    )


def llama_config(vocabulary: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )


def _gpt2(vocabulary: int) -> GPT2Config:
    return GPT2Config(
        vocab_size=vocabulary,
        n_positions=POSITIONS,
        n_embd=32,
        n_layer=2,
        n_head=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=1,
        eos_token_id=1,
    )


def _t5(vocabulary: int) -> T5Config:
    return T5Config(
        vocab_size=vocabulary,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        # T5 v1.1's: at the kink of ReLU the gradient jumps by 1e-4 for a rounding of the input
        feed_forward_proj="gated-gelu",
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,  # pyright: ignore[reportCallIssue]
    )


def _bart(vocabulary: int) -> BartConfig:
    return BartConfig(
        vocab_size=vocabulary,
        max_position_embeddings=POSITIONS,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        dropout=0.0,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
        decoder_start_token_id=1,
        forced_eos_token_id=1,
    )


def _draw(model: nn.Module) -> None:
    # biases and norms too: from zero a bias has no scale to compare with, and large enough that attention and
    # head depend on their inputs
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre = 1.0 if parameter.dim() == 1 and name.endswith("weight") else 0.0
            parameter.copy_(centre + 0.15 * torch.randn(parameter.shape, generator=generator))


def build_models(root: Path, texts: list[str]) -> None:
    """One folder per model under `root`."""
    bert, chatml, t5 = wordpiece(texts), chatml_bpe(texts), sentinel_bpe(texts)
    words, chat_tokens, pieces = len(bert), len(chatml), len(t5)

    def classifier(labels: int, problem: str) -> nn.Module:
        return BertForSequenceClassification(_bert(words, num_labels=labels, problem_type=problem))

    made: dict[str, tuple[Any, PreTrainedTokenizerFast]] = {
        "llama": (LlamaForCausalLM(llama_config(chat_tokens)), chatml),
        "gpt2": (GPT2LMHeadModel(_gpt2(chat_tokens)), chatml),
        "t5": (T5ForConditionalGeneration(_t5(pieces)), t5),
        "bart": (BartForConditionalGeneration(_bart(pieces)), t5),
        "bert_mlm": (BertForMaskedLM(_bert(words)), bert),
        "bert_nsp": (BertForPreTraining(_bert(words)), bert),
        "bert_single": (classifier(4, "single_label_classification"), bert),
        "bert_pairs": (classifier(2, "single_label_classification"), bert),
        "bert_multi": (classifier(3, "multi_label_classification"), bert),
        "bert_regression": (classifier(1, "regression"), bert),
        "bert_tags": (BertForTokenClassification(_bert(words, num_labels=5)), bert),
        "bert_qa": (BertForQuestionAnswering(_bert(words)), bert),
    }
    for name, (model, tokenizer) in made.items():
        assert sum(p.numel() for p in model.parameters()) <= MAX_PARAMETERS, name
        _draw(model)
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
