"""Chat templates in the manner of well-known model families, written for the tests, and a tokenizer for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tunesmith.data.chat import encode_chat, resolve_template, spans
from tunesmith.data.examples import Chat, Message
from tunesmith.errors import Place


@dataclass(frozen=True)
class Style:
    """A template; `before` is what it puts between the generation prompt's end and an answer, `end` the end
    marker; `strips` where it strips contents; `system` where it takes a system message."""

    source: str
    end: str
    eos: str
    bos: str | None = None
    before: str = ""
    strips: bool = False
    system: bool = True


CHATML = """{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

LLAMA2 = """{%- if messages[0].role == 'system' %}
{%- set system = '<<SYS>>\\n' + messages[0].content + '\\n<</SYS>>\\n\\n' %}{% set rest = messages[1:] %}
{%- else %}{% set system = '' %}{% set rest = messages %}{% endif %}
{%- for m in rest %}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}
{%- if m.role == 'user' %}{{ bos_token + '[INST] ' + (system if loop.first else '') + m.content.strip() + ' [/INST]' }}
{%- else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}
{%- endfor %}"""

LLAMA3 = """{% for m in messages %}{% set text = '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' +
m.content | trim + '<|eot_id|>' %}{{ (bos_token if loop.first else '') + text }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"""

GEMMA = """{{ bos_token }}{% for m in messages %}
{%- if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}
{{- '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' }}
{{- m.content | trim + '<end_of_turn>\\n' }}
{%- endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"""

MISTRAL = """{{ bos_token }}{% if messages[0].role == 'system' %}{% set system = messages[0].content %}
{%- set rest = messages[1:] %}{% else %}{% set rest = messages %}{% endif %}
{%- for m in rest %}{% if m.role == 'user' %}
{{- '[INST]' + (system + '\\n\\n' if loop.last and system is defined else '') + m.content + '[/INST]' }}
{%- else %}{{ m.content + eos_token }}{% endif %}{% endfor %}"""

QWEN3 = """{% set ns = namespace(last=-1) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
{%- if m.role == 'assistant' %}
    {%- set content = m.content %}{% set thought = '' %}
    {%- if '</think>' in content %}
        {%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if loop.index0 > ns.last and (loop.last or thought) %}
        {{- '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' }}
    {%- endif %}
    {{- content }}
    {%- for call in m.tool_calls or [] %}
        {{- '\\n' if content or not loop.first else '' }}
        {{- '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
        {{- (call.function.arguments | tojson) + '}\\n</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- elif m.role == 'tool' %}
    {{- '<|im_start|>user\\n<tool_response>\\n' + m.content + '\\n</tool_response><|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>' + m.role + '\\n' }}
    {%- if loop.first and tools %}{{ 'Tools: ' + (tools | tojson) + '\\n' }}{% endif %}
    {{- m.content + '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

PHI = """{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"""

DEEPSEEK = """{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}
{%- elif m.role == 'user' %}{{ '<｜User｜>' + m.content }}
{%- else %}{{ '<｜Assistant｜>' + m.content.split('</think>')[-1] + eos_token }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<｜Assistant｜><think>\\n' }}{% endif %}"""

ZEPHYR = """{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content + eos_token + '\\n' }}
{%- if loop.last and add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}{% endfor %}"""

# its block takes the newline behind the end marker too, which only the template can know
MARKED = """{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}
{%- if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>\\n' }}{% endgeneration %}
{%- else %}{{ m.content + '<|im_end|>\\n' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

# marks the content alone, so that the end marker would not be learnt
MARKED_CONTENT = MARKED.replace(
    "{% generation %}{{ m.content + '<|im_end|>\\n' }}{% endgeneration %}",
    "{% generation %}{{ m.content }}{% endgeneration %}{{ '<|im_end|>\\n' }}",
)

# no generation prompt, and nothing after an answer
ALPACA = """{% for m in messages %}{{ '### ' + ('Response' if m.role == 'assistant' else 'Instruction') }}:
{{ m.content }}

{% endfor %}"""

STYLES = {
    "chatml": Style(CHATML, "<|im_end|>", "<|im_end|>"),
    "llama2": Style(LLAMA2, " </s>", "</s>", "<s>", before=" ", strips=True),
    "llama3": Style(LLAMA3, "<|eot_id|>", "</s>", "<s>", strips=True),
    "gemma": Style(GEMMA, "<end_of_turn>", "</s>", "<s>", strips=True, system=False),
    "mistral": Style(MISTRAL, "</s>", "</s>", "<s>"),
    "qwen3": Style(QWEN3, "<|im_end|>", "<|im_end|>"),
    "phi": Style(PHI, "<|end|>", "<|endoftext|>"),
    "deepseek": Style(DEEPSEEK, "</s>", "</s>", "<s>"),
    "zephyr": Style(ZEPHYR, "</s>", "</s>", before="\n"),
    "marked": Style(MARKED, "<|im_end|>\n", "<|im_end|>"),
    "marked_content": Style(MARKED_CONTENT, "<|im_end|>", "<|im_end|>"),
}

SPECIAL = "<s> </s> <|im_start|> <|im_end|> <|start_header_id|> <|end_header_id|> <|eot_id|> <start_of_turn>"
SPECIAL += (
    " <end_of_turn> <|user|> <|assistant|> <|system|> <|end|> <|endoftext|> <｜User｜> <｜Assistant｜> [INST]"
)
SPECIAL += " [/INST]"
# newlines merge with their neighbours, so that tokens straddle the edges of answers
_CORPUS = ["assistant\nI think", "is seven.<|im_end|>\n", "你好，世界。", "What is it that you said? Hello."]


def tokenizer(
    source: str | None,
    *,
    eos: str | None = "</s>",
    bos: str | None = None,
    special: str = SPECIAL,
    merges: bool = False,
) -> PreTrainedTokenizerFast:
    """Byte-level; without `merges` a token is a byte or a special token, so that labels decode to exactly the
    trained characters."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    names = special.split()
    trainer = trainers.BpeTrainer(
        vocab_size=256 + len(names) + 100 * merges,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=names,
        show_progress=False,
    )
    made.train_from_iterator(_CORPUS * 9, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=made, bos_token=bos, eos_token=eos, pad_token=eos)
    fast.chat_template = source
    return fast


def style_tokenizer(name: str) -> PreTrainedTokenizerFast:
    style = STYLES[name]
    return tokenizer(style.source, eos=style.eos, bos=style.bos)


def chat(*turns: tuple[Any, ...], tools: tuple[dict[str, Any], ...] = ()) -> Chat:
    """Turns of (role's first letter, content, [train], [tool_calls])."""
    roles = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
    return Chat(tuple(Message(roles[role], *rest) for role, *rest in turns), Place("chats.jsonl", 7), tools)


TOOLS = ({"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}},)


def call(name: str, **arguments: object) -> tuple[dict[str, object], ...]:
    return ({"type": "function", "function": {"name": name, "arguments": arguments}},)


def trained(tokens: PreTrainedTokenizerFast, row: Chat, choice: str | None = None) -> list[str]:
    """The trained texts, after checking that the labels decode to them (tokens of a byte each)."""
    template = resolve_template(tokens, choice)
    text, found = spans(template, tokens, row)
    texts = [text[span.start : span.end] for span in found]
    encoded = encode_chat(template, tokens, row, 100_000)
    assert tokens.decode(encoded.input_ids, clean_up_tokenization_spaces=False) == text
    labels = [label for label in encoded.labels if label != -100]
    assert tokens.decode(labels, clean_up_tokenization_spaces=False) == "".join(texts)
    return texts
