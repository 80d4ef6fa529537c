"""The formats that give conversations: prompt_answer, alpaca, messages (OpenAI), sharegpt."""

from __future__ import annotations

from typing import Any

from tunesmith.data.cells import Cells, found
from tunesmith.data.examples import Chat, Message

_SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "tool": "tool",
}
_ROLES = ("system", "user", "assistant", "tool")


def prompt_answer(cells: Cells, need_labels: bool) -> Chat:
    """[system], user, assistant; without an answer the last is left out at prediction."""
    turns = [*_system(cells), Message("user", cells.text("prompt")), *_answer(cells, "answer", need_labels)]
    return Chat(tuple(turns), cells.row.place)


def alpaca(cells: Cells, need_labels: bool) -> Chat:
    """[system], the history's turns, then instruction and input (joined by a line break), output."""
    turns = _system(cells)
    history = cells.find("history")
    for number, turn in enumerate(cells.list_of("history", history) if history is not None else [], start=1):
        pair = cells.list_of("history", turn, f"turn {number}")
        if len(pair) != 2:
            raise cells.error(
                "history", f"turn {number}: must be [user, assistant], not a list of {len(pair)}"
            )
        turns.append(Message("user", cells.text_of("history", pair[0], f"turn {number}")))
        turns.append(Message("assistant", cells.text_of("history", pair[1], f"turn {number}")))
    prompt = "\n".join(part for part in (cells.text("instruction"), cells.find_text("input")) if part)
    turns.append(Message("user", prompt))
    turns += _answer(cells, "output", need_labels)
    return Chat(tuple(turns), cells.row.place)


def messages(cells: Cells, need_labels: bool) -> Chat:
    """OpenAI's chat format: {role, content, [tool_calls], [train or weight]} each."""
    turns = [
        _message(cells, message, f"message {number}")
        for number, message in enumerate(_turns(cells, "messages"), start=1)
    ]
    return _chat(cells, "messages", turns, need_labels)


def sharegpt(cells: Cells, need_labels: bool) -> Chat:
    """{from, value} each; a `function_call` is an assistant's tool call: a JSON object {name, arguments}, or
    a list of them."""
    turns = [
        _sharegpt_message(cells, message, f"message {number}")
        for number, message in enumerate(_turns(cells, "conversations"), start=1)
    ]
    system = _system(cells)
    if system and turns[0].role == "system":
        raise cells.error("system", "the conversation begins with a system message already: keep one")
    return _chat(cells, "conversations", [*system, *turns], need_labels)


def _system(cells: Cells) -> list[Message]:
    text = cells.find_text("system")
    return [Message("system", text)] if text else []


def _answer(cells: Cells, key: str, need_labels: bool) -> list[Message]:
    value = cells.get(key) if need_labels else cells.find(key)
    return [Message("assistant", cells.text_of(key, value))] if need_labels or value is not None else []


def _turns(cells: Cells, key: str) -> list[dict[str, Any]]:
    value = cells.get(key)
    if value is None:
        raise cells.error(key, "must be a list, not null")
    turns = cells.objects(key, value)
    if not turns:
        raise cells.error(key, "there are no messages")
    return turns


def _chat(cells: Cells, key: str, turns: list[Message], need_labels: bool) -> Chat:
    if need_labels and all(turn.role != "assistant" for turn in turns):
        raise cells.error(key, "there is no assistant message to learn from")
    tools = tuple(_tool(tool) for tool in cells.objects("tools", cells.find("tools")))
    return Chat(tuple(turns), cells.row.place, tools)


def _tool(tool: dict[str, Any]) -> dict[str, Any]:
    # the form that chat templates are written for; some data sets give the function alone
    return {"type": "function", "function": tool} if "name" in tool and "function" not in tool else tool


def _message(cells: Cells, message: dict[str, Any], what: str) -> Message:
    role = message.get("role")
    if role not in _ROLES:
        raise cells.error("messages", f"{what}: unknown role {role!r}: there are {', '.join(_ROLES)}")
    calls = cells.objects("messages", message.get("tool_calls"), f"{what}: tool_calls")
    content = message.get("content")
    if content is None:
        if not calls:
            raise cells.error("messages", f"{what}: has no content")
        content = ""
    elif isinstance(content, list):
        content = _joined(cells, content, what)
    return Message(
        role,
        cells.text_of("messages", content, f"{what}: content"),
        _train(cells, "messages", message, what),
        tuple(_tool_call(cells, "messages", call, what) for call in calls),
    )


def _joined(cells: Cells, parts: list[Any], what: str) -> str:
    texts: list[str] = []
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            name = repr(kind) if kind is not None else f"that is {found(part)}"
            raise cells.error("messages", f"{what}: a content part {name}: only text is read")
        texts.append(cells.text_of("messages", part.get("text"), f"{what}: text of a content part"))
    return "".join(texts)


def _sharegpt_message(cells: Cells, message: dict[str, Any], what: str) -> Message:
    key = "conversations"
    sender = message.get("from")
    role = _SHAREGPT_ROLES.get(sender) if isinstance(sender, str) else None
    if role is None:
        raise cells.error(key, f"{what}: unknown `from` {sender!r}: there are {', '.join(_SHAREGPT_ROLES)}")
    if message.get("value") is None:
        raise cells.error(key, f"{what}: has no value")
    value = cells.text_of(key, message["value"], f"{what}: value")
    train = _train(cells, key, message, what)
    if sender != "function_call":
        return Message(role, value, train)
    parsed = cells.parsed(key, value, f"{what}: function_call")
    calls = cells.objects(key, parsed if isinstance(parsed, list) else [parsed], f"{what}: function_call")
    return Message(role, "", train, tuple(_tool_call(cells, key, {"function": call}, what) for call in calls))


def _tool_call(cells: Cells, key: str, call: dict[str, Any], what: str) -> dict[str, Any]:
    """The call with its arguments as an object, which is what chat templates serialise; OpenAI gives JSON
    text."""
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise cells.error(key, f"{what}: a tool call has no function with a name")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        arguments = (
            cells.parsed(key, arguments, f"{what}: arguments of {function['name']}") if arguments else {}
        )
    return {"type": "function", **call, "function": {**function, "arguments": arguments or {}}}


def _train(cells: Cells, key: str, message: dict[str, Any], what: str) -> bool | None:
    train, weight = message.get("train"), message.get("weight")
    if train is not None and not isinstance(train, bool):
        raise cells.error(key, f"{what}: train: must be true or false, not {found(train)}")
    if weight is None:
        return train
    if weight not in (0, 1):
        raise cells.error(key, f"{what}: weight: must be 0 or 1, not {found(weight)}")
    if train is not None and train != bool(weight):
        raise cells.error(key, f"{what}: train and weight contradict each other")
    return bool(weight)
