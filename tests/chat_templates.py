"""Chat templates of many families, written anew. Each treats roles, contents, tools and thoughts as
the family's own does."""

# ruff: noqa: RUF001 - the fullwidth bars are DeepSeek's own

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """One chat template and what is known about it.

    end: what ends an answer, with the whitespace that the template writes before the end token;
    empty where there is none. lead: what an answer written in full has between the generation
    prompt and its text. opens: the thinking block that the generation prompt leaves open; closes:
    how the template closes one that holds nothing. specials: the special tokens of its tokenizer,
    among them bos and eos, which the template is given. call_end: what ends a turn that calls
    tools, where that is not `end`. system, tools, documents: which of these it shows; reasoning: it
    shows `reasoning_content`. consecutive, leading, trailing: it takes two answers in a row, an
    answer before any question, a question without an answer. beside: it can be judged when it is
    given a system text and tools at once; parts: a content may be a list of parts. options: one set
    of chat_template_kwargs that changes what it writes.
    """

    name: str
    template: str
    end: str
    lead: str = ""
    opens: str = ""
    closes: str = ""
    specials: tuple[str, ...] = ()
    bos: str = ""
    eos: str = ""
    call_end: str = ""
    system: bool = True
    tools: bool = False
    documents: bool = False
    reasoning: bool = False
    consecutive: bool = True
    leading: bool = True
    trailing: bool = True
    beside: bool = True
    parts: bool = False
    options: tuple[tuple[str, str | bool], ...] = ()


IM = ("<|im_start|>", "<|im_end|>")
THINK = ("<think>", "</think>")
CALL = ("<tool_call>", "</tool_call>")
INST = ("<s>", "</s>", "[INST]", "[/INST]")
LLAMA = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
DEEPSEEK = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>")
DEEPSEEK_TOOLS = (
    "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>",
    "<｜tool▁outputs▁begin｜>", "<｜tool▁outputs▁end｜>", "<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>",
)  # fmt: skip
GEMMA = ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>")
COHERE = (
    "<BOS_TOKEN>", "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>",
    "<|SYSTEM_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>",
)  # fmt: skip

# `system` and `rest`: the first message's text if it is the system's, and the messages after it
SPLIT = (
    r"{% set system = messages[0].content if messages[0].role == 'system' else none %}"
    r"{% set rest = messages if system is none else messages[1:] %}"
)
ALTERNATE = (
    r"{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    r"{{ raise_exception('Questions and answers take turns, a question first') }}{% endif %}"
)
ASSISTANT = r"{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
TURN = r"{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"

CHATML = r"{% for m in messages %}" + TURN + r"{% endfor %}" + ASSISTANT

TOOL_LIST = (
    r"{% if tools %}{{ '\n\n# Tools\n<tools>' }}{% for t in tools %}{{ '\n' + t | tojson }}{% endfor %}"
    r"{{ '\n</tools>\nTo call one, write its name and arguments as JSON inside <tool_call></tool_call>.' }}{% endif %}"
)
# results that follow each other stand in one turn of the user
TOOL_RESULT = (
    r"{% if m.role == 'tool' %}"
    r"{% if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{ '<|im_start|>user' }}{% endif %}"
    r"{{ '\n<tool_response>\n' + m.content + '\n</tool_response>' }}"
    r"{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>\n' }}{% endif %}"
)
QWEN25 = (
    r"{{ '<|im_start|>system\n' + (messages[0].content if messages[0].role == 'system' else 'You are Q, an assistant.') }}"
    + TOOL_LIST
    + r"{{ '<|im_end|>\n' }}{% for m in messages %}"
    + TOOL_RESULT
    + r"{% elif m.role == 'assistant' and m.tool_calls %}"
    r"{{ '<|im_start|>assistant' + ('\n' + m.content if m.content else '') }}"
    r"{% for c in m.tool_calls %}{{ '\n<tool_call>\n' + c.function | tojson + '\n</tool_call>' }}{% endfor %}"
    r"{{ '<|im_end|>\n' }}"
    r"{% elif m.role != 'system' or not loop.first %}" + TURN + r"{% endif %}{% endfor %}" + ASSISTANT
)

# `ns.query`: where the last real question stands; `thought` and `text`: the two halves of an answer
LAST_QUERY = (
    r"{% set ns = namespace(query=messages | length - 1, found=false) %}{% for m in messages[::-1] %}"
    r"{% if not ns.found and m.role == 'user' and not m.content.startswith('<tool_response>') %}"
    r"{% set ns.found = true %}{% set ns.query = messages | length - 1 - loop.index0 %}{% endif %}{% endfor %}"
)
HALVES = (
    r"{% set text = m.content or '' %}{% set thought = '' %}"
    r"{% if m.reasoning_content is string %}{% set thought = m.reasoning_content %}"
    r"{% elif '</think>' in text %}{% set thought = text.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    r"{% set text = text.split('</think>')[-1].lstrip('\n') %}{% endif %}"
)
SYSTEM_AND_TOOLS = (
    r"{% if tools or messages[0].role == 'system' %}"
    r"{{ '<|im_start|>system\n' + (messages[0].content if messages[0].role == 'system' else 'Tools are at hand.') }}"
    + TOOL_LIST
    + r"{{ '<|im_end|>\n' }}{% endif %}"
)
QWEN3 = (
    LAST_QUERY
    + SYSTEM_AND_TOOLS
    + r"{% for m in messages %}"
    + TOOL_RESULT
    + r"{% elif m.role == 'assistant' %}"
    + HALVES
    + r"{{ '<|im_start|>assistant\n' }}{% if loop.index0 > ns.query and (loop.last or thought) %}"
    r"{{ '<think>\n' + thought.strip('\n') + '\n</think>\n\n' + text.lstrip('\n') }}{% else %}{{ text }}{% endif %}"
    r"{% for c in m.tool_calls or [] %}{{ '\n' if text or not loop.first }}"
    r"{{ '<tool_call>\n' + c.function | tojson + '\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\n' }}"
    r"{% elif m.role != 'system' or not loop.first %}" + TURN + r"{% endif %}{% endfor %}"
    r"{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    r"{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
QWEN35 = (
    LAST_QUERY
    + r"{% if not ns.found %}{{ raise_exception('There is no question') }}{% endif %}"
    + SYSTEM_AND_TOOLS
    + r"{% for m in messages %}"
    + TOOL_RESULT
    + r"{% elif m.role == 'assistant' %}"
    + HALVES
    + r"{{ '<|im_start|>assistant\n' }}"
    r"{% if loop.index0 > ns.query %}{{ '<think>\n' + thought | trim + '\n</think>\n\n' }}{% endif %}{{ text | trim }}"
    r"{% for c in m.tool_calls or [] %}{{ '\n\n' if loop.first and text | trim else '' if loop.first else '\n' }}"
    r"{{ '<tool_call>\n<function=' + c.function.name + '>\n' }}"
    r"{% for key, value in c.function.arguments | items %}{{ '<parameter=' + key + '>\n' + value + '\n</parameter>\n' }}"
    r"{% endfor %}{{ '</function>\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\n' }}"
    r"{% elif m.role == 'user' %}{{ '<|im_start|>user\n' + m.content | trim + '<|im_end|>\n' }}"
    r"{% elif not loop.first %}{{ raise_exception('The system speaks first') }}{% endif %}{% endfor %}"
    r"{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}"
    r"{% if enable_thinking is defined and enable_thinking is false %}{{ '\n</think>\n\n' }}{% endif %}{% endif %}"
)
QWQ = (
    r"{% for m in messages %}{% if m.role == 'assistant' %}"
    r"{{ '<|im_start|>assistant\n' + m.content.split('</think>')[-1].lstrip('\n') + '<|im_end|>\n' }}"
    r"{% else %}" + TURN + r"{% endif %}{% endfor %}"
    r"{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)

LLAMA2 = (
    SPLIT + r"{% for m in rest %}" + ALTERNATE + r"{% if m.role == 'user' %}{{ bos_token + '[INST] ' }}"
    r"{% if loop.first and system is not none %}{{ '<<SYS>>\n' + system + '\n<</SYS>>\n\n' }}{% endif %}"
    r"{{ m.content.strip() + ' [/INST]' }}{% else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
HEADER = r"'<|start_header_id|>' + m.role + '<|end_header_id|>\n\n'"
LLAMA3_TURNS = (
    r"{{ bos_token }}{% for m in messages %}{{ " + HEADER + r" + m.content | trim + '<|eot_id|>' }}{% endfor %}"
)  # fmt: skip
LLAMA3_PROMPT = r"{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
LLAMA3 = LLAMA3_TURNS + r"{% if add_generation_prompt %}" + LLAMA3_PROMPT + r"{% endif %}"
LLAMA31 = (
    SPLIT + r"{{ bos_token + '<|start_header_id|>system<|end_header_id|>\n\n' + ('Environment: ipython\n' if tools else '') }}"
    r"{{ 'Knowledge until: December 2023\nToday: ' + (date_string or '26 Jul 2024') + '\n\n' }}"
    r"{{ (system or '') | trim + '<|eot_id|>' }}{% for m in rest %}"
    r"{% if m.role == 'tool' %}"
    r"{{ '<|start_header_id|>ipython<|end_header_id|>\n\n' + {'output': m.content} | tojson + '<|eot_id|>' }}"
    r"{% elif m.tool_calls %}{% if m.tool_calls | length > 1 %}{{ raise_exception('One call at a time') }}{% endif %}"
    r"{% set f = m.tool_calls[0].function %}{{ " + HEADER + r" }}"
    r"""{{ '{"name": "' + f.name + '", "parameters": ' + f.arguments | tojson + '}<|eot_id|>' }}"""
    r"{% else %}{{ " + HEADER + r" }}{% if loop.first and tools %}"
    r"{{ 'Answer with JSON that calls one of these functions:\n\n' }}"
    r"{% for t in tools %}{{ t | tojson(indent=4) + '\n\n' }}{% endfor %}{% endif %}"
    r"{{ m.content | trim + '<|eot_id|>' }}{% endif %}{% endfor %}"
    r"{% if add_generation_prompt %}" + LLAMA3_PROMPT + r"{% endif %}"
)

MISTRAL1 = (
    r"{{ bos_token }}{% for m in messages %}" + ALTERNATE + r"{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    r"{% elif m.role == 'assistant' %}{{ m.content + eos_token + ' ' }}"
    r"{% else %}{{ raise_exception('Only user and assistant speak') }}{% endif %}{% endfor %}"
)
MISTRAL2 = (
    SPLIT + r"{{ bos_token }}{% for m in rest %}" + ALTERNATE + r"{% if m.role == 'user' %}{{ ' [INST] ' }}"
    r"{% if loop.first and system is not none %}{{ system + '\n\n' }}{% endif %}{{ m.content + ' [/INST]' }}"
    r"{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)


def mistral3(gap: str, answer: str) -> str:
    """The third Mistral template. gap: stands between a control token and what follows it; answer:
    how an answer is written."""
    template = (
        SPLIT + r"{% set ns = namespace(count=0, last=-1) %}{% for m in rest %}"
        r"{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}"
        r"{% if m.role != 'tool' and not m.tool_calls %}{% if (m.role == 'user') != (ns.count % 2 == 0) %}"
        r"{{ raise_exception('Questions and answers take turns, a question first') }}{% endif %}"
        r"{% set ns.count = ns.count + 1 %}{% endif %}{% endfor %}"
        r"{{ bos_token }}{% for m in rest %}{% if m.role == 'user' %}"
        r"{% if tools and loop.index0 == ns.last %}"
        r"{{ '[AVAILABLE_TOOLS]GAP' + tools | tojson + '[/AVAILABLE_TOOLS]' }}{% endif %}"
        r"{{ '[INST]GAP' + (system + '\n\n' if system is not none and loop.last else '') + m.content + '[/INST]' }}"
        r"{% elif m.tool_calls %}{{ '[TOOL_CALLS]GAP[' }}{% for c in m.tool_calls %}"
        r"{% if c.id is not defined or c.id | length != 9 %}{{ raise_exception('An id has nine characters') }}{% endif %}"
        r"""{{ (c.function | tojson)[:-1] + ', "id": "' + c.id + '"}' + (']' if loop.last else ', ') }}"""
        r"{% endfor %}{{ eos_token }}{% elif m.role == 'tool' %}"
        r"""{{ '[TOOL_RESULTS]GAP{"content": ' + m.content + ', "call_id": "' + m.tool_call_id + '"}[/TOOL_RESULTS]' }}"""
        r"{% else %}{{ ANSWER + eos_token }}{% endif %}{% endfor %}"
    )
    return template.replace("GAP", gap).replace("ANSWER", answer)


MISTRAL_SMALL = (
    SPLIT + r"{{ bos_token + '[SYSTEM_PROMPT]' + (system or 'You are M, an assistant.') + '[/SYSTEM_PROMPT]' }}"
    r"{% for m in rest %}" + ALTERNATE + r"{% if m.role == 'user' %}{{ '[INST]' + m.content + '[/INST]' }}"
    r"{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}"
)

DEEPSEEK2 = (
    r"{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ 'User: ' + m.content + '\n\n' }}"
    r"{% elif m.role == 'assistant' %}{{ 'Assistant: ' + m.content + eos_token }}{% else %}{{ m.content + '\n\n' }}{% endif %}"
    r"{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
DEEPSEEK3 = (
    r"{% set ns = namespace(tool=false) %}{{ bos_token }}"
    r"{% for m in messages if m.role == 'system' %}{{ m.content }}{% endfor %}"
    r"{% for m in messages if m.role != 'system' %}"
    r"{% if m.role == 'tool' %}{{ '\n' if ns.tool else '<｜tool▁outputs▁begin｜>' }}"
    r"{{ '<｜tool▁output▁begin｜>' + m.content + '<｜tool▁output▁end｜>' }}{% set ns.tool = true %}{% else %}"
    r"{% if m.role == 'user' %}{{ '<｜User｜>' + m.content }}{% else %}"
    r"{{ '<｜tool▁outputs▁end｜>' if ns.tool else '<｜Assistant｜>' }}{{ (m.content or '').split('</think>')[-1] }}"
    r"{% if m.tool_calls %}{{ '<｜tool▁calls▁begin｜>' }}{% for c in m.tool_calls %}{{ '' if loop.first else '\n' }}"
    r"{{ '<｜tool▁call▁begin｜>' + c.type + '<｜tool▁sep｜>' + c.function.name }}"
    r"{{ '\n```json\n' + c.function.arguments | tojson + '\n```<｜tool▁call▁end｜>' }}{% endfor %}"
    r"{{ '<｜tool▁calls▁end｜>' }}{% endif %}{{ eos_token }}{% endif %}{% set ns.tool = false %}{% endif %}{% endfor %}"
    r"{% if ns.tool %}{{ '<｜tool▁outputs▁end｜>' }}{% elif add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}"
)
DEEPSEEK_R1 = DEEPSEEK3.replace(
    r"add_generation_prompt %}{{ '<｜Assistant｜>' }}", r"add_generation_prompt %}{{ '<｜Assistant｜><think>\n' }}"
)
DEEPSEEK31 = (
    r"{% set ns = namespace(system='', asked=false, tool=false) %}{% for m in messages if m.role == 'system' %}"
    r"{% set ns.system = ns.system + ('\n\n' if ns.system else '') + m.content %}{% endfor %}{{ bos_token + ns.system }}"
    r"{% for m in messages %}{% if m.role == 'user' %}{% set ns.asked = true %}{% set ns.tool = false %}"
    r"{{ '<｜User｜>' + m.content }}{% elif m.role == 'tool' %}{% set ns.asked = false %}{% set ns.tool = true %}"
    r"{{ '<｜tool▁output▁begin｜>' + m.content + '<｜tool▁output▁end｜>' }}"
    r"{% elif m.role == 'assistant' %}{{ '<｜Assistant｜></think>' if ns.asked }}{% set text = m.content or '' %}"
    r"{{ text if ns.tool or '</think>' not in text else text.split('</think>', 1)[1] }}"
    r"{% set ns.asked = false %}{% set ns.tool = false %}{% if m.tool_calls %}{{ '<｜tool▁calls▁begin｜>' }}"
    r"{% for c in m.tool_calls %}{{ '<｜tool▁call▁begin｜>' + c.function.name + '<｜tool▁sep｜>' }}"
    r"{{ c.function.arguments | tojson + '<｜tool▁call▁end｜>' }}{% endfor %}{{ '<｜tool▁calls▁end｜>' }}{% endif %}"
    r"{{ eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt and ns.asked %}"
    r"{{ '<｜Assistant｜>' + ('<think>' if thinking is defined and thinking else '</think>') }}{% endif %}"
)
DEEPSEEK_CODER = (
    r"{{ bos_token + ('' if messages[0].role == 'system' else 'You write programs and answer nothing else.\n') }}"
    r"{% for m in messages %}{% if m.role == 'system' %}{{ m.content + '\n' }}"
    r"{% elif m.role == 'user' %}{{ '### Instruction:\n' + m.content + '\n' }}"
    r"{% else %}{{ '### Response:\n' + m.content + '\n<|EOT|>\n' }}{% endif %}{% endfor %}"
    r"{% if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}"
)

GEMMA1 = (
    r"{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('There is no system role') }}{% endif %}"
    r"{% for m in messages %}" + ALTERNATE + r"{% set role = 'model' if m.role == 'assistant' else m.role %}"
    r"{{ '<start_of_turn>' + role + '\n' + m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
    r"{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
GEMMA3 = (
    r"{{ bos_token }}" + SPLIT + r"{% for m in rest %}" + ALTERNATE + r"{{ '<start_of_turn>' }}"
    r"{{ ('model' if m.role == 'assistant' else m.role) + '\n' }}"
    r"{% if loop.first and system is not none %}{{ (system if system is string else system[0].text) + '\n\n' }}{% endif %}"
    r"{% if m.content is string %}{{ m.content | trim }}{% else %}{% for part in m.content %}"
    r"{{ '<start_of_image>' if part.type == 'image' else part.text | trim }}{% endfor %}{% endif %}{{ '<end_of_turn>\n' }}"
    r"{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)

PHI3 = (
    r"{{ bos_token }}{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    r"{{ '<|assistant|>\n' if add_generation_prompt else eos_token }}"
)
PHI4 = (
    r"{% for m in messages %}{{ '<|im_start|>' + m.role + '<|im_sep|>' + m.content + '<|im_end|>' }}{% endfor %}"
    r"{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"
)
GRANITE = (
    SPLIT + r"{{ '<|start_of_role|>system<|end_of_role|>' }}{% if system is not none %}{{ system }}{% else %}"
    r"{{ 'Knowledge until: April 2024.\nToday: ' + strftime_now('%B %Y') + '.\nYou are G, an assistant' }}"
    r"{{ ' that uses the tools below' if tools }}{{ ' that cites the documents below' if documents }}{{ '.' }}{% endif %}"
    r"{{ '<|end_of_text|>\n' }}"
    r"{% if tools %}{{ '<|start_of_role|>tools<|end_of_role|>' + tools | tojson(indent=4) + '<|end_of_text|>\n' }}{% endif %}"
    r"{% for d in documents or [] %}{{ '<|start_of_role|>document<|end_of_role|>' + d.title + '\n' + d.text }}"
    r"{{ '<|end_of_text|>\n' }}{% endfor %}{% for m in rest %}"
    r"{{ '<|start_of_role|>' + ('tool_response' if m.role == 'tool' else m.role) + '<|end_of_role|>' + (m.content or '') }}"
    r"{% if m.tool_calls %}{{ '<|tool_call|>' + m.tool_calls | map(attribute='function') | list | tojson }}{% endif %}"
    r"{{ '<|end_of_text|>\n' }}{% endfor %}"
    r"{% if add_generation_prompt %}{{ '<|start_of_role|>assistant<|end_of_role|>' }}{% endif %}"
)
OLMO2 = (
    r"{{ bos_token }}{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content }}"
    r"{% if m.role != 'assistant' %}{{ '\n' }}{% else %}{{ eos_token + ('' if loop.last else '\n') }}{% endif %}"
    r"{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}"
)
SMOLLM2 = (
    r"{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nYou are S, a small assistant.<|im_end|>\n' }}{% endif %}"
    + CHATML
)
SMOLLM3 = (
    SPLIT + r"{% set off = enable_thinking is defined and not enable_thinking %}{% if '/no_think' in (system or '') %}"
    r"{% set off = true %}{% elif '/think' in (system or '') %}{% set off = false %}{% endif %}"
    r"{% set words = (system or '').replace('/no_think', '').replace('/think', '').rstrip() %}"
    r"{{ '<|im_start|>system\n## Metadata\n\nToday: ' + strftime_now('%B %Y') + '\nMode: ' }}"
    r"{{ ('/no_think' if off else '/think') + '\n\n## Instructions\n\n' }}"
    r"{{ words or ('You are S.' if off else 'You are S. Think first, then answer.') }}{{ '\n\n<|im_end|>\n' }}"
    r"{% set empty = '<think>\n\n</think>\n' if off else '' %}{% for m in rest %}"
    r"{% if m.role == 'assistant' %}{{ '<|im_start|>assistant\n' + empty + m.content.lstrip('\n') + '<|im_end|>\n' }}"
    r"{% else %}" + TURN + r"{% endif %}{% endfor %}"
    r"{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' + empty }}{% endif %}"
)
ZEPHYR = (
    r"{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}"
    r"{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}"
)
VICUNA = (
    SPLIT + r"{{ (system or 'A curious user talks with a polite assistant.') + ' ' }}{% for m in rest %}"
    r"{{ 'USER: ' + m.content + ' ' if m.role == 'user' else 'ASSISTANT: ' + m.content + eos_token }}{% endfor %}"
    r"{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
ALPACA = (
    SPLIT + r"{{ bos_token + (system or 'Below is a task. Write what completes it.') + '\n\n' }}{% for m in rest %}"
    r"{% if m.role == 'user' %}{{ '### Instruction:\n' + m.content | trim + '\n\n' }}"
    r"{% else %}{{ '### Response:\n' + m.content | trim + eos_token + '\n\n' }}{% endif %}{% endfor %}"
    r"{% if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}"
)
COMMAND_R = (
    SPLIT + r"{{ bos_token }}{% if system is not none %}"
    r"{{ '<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>' + system + '<|END_OF_TURN_TOKEN|>' }}{% endif %}"
    r"{% for m in rest %}" + ALTERNATE + r"{{ '<|START_OF_TURN_TOKEN|>' }}"
    r"{{ '<|USER_TOKEN|>' if m.role == 'user' else '<|CHATBOT_TOKEN|>' }}{{ m.content.strip() + '<|END_OF_TURN_TOKEN|>' }}"
    r"{% endfor %}{% if documents %}{{ '<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|><results>' }}{% for d in documents %}"
    r"{{ '\nDocument: ' ~ loop.index0 ~ '\n' ~ d.title ~ '\n' ~ d.text }}{% endfor %}"
    r"{{ '</results><|END_OF_TURN_TOKEN|>' }}{% endif %}"
    r"{% if add_generation_prompt %}{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{% endif %}"
)
FALCON = (
    r"{% for m in messages %}{{ {'system': 'System', 'user': 'User', 'assistant': 'Falcon'}[m.role] + ': ' + m.content }}"
    r"{% if add_generation_prompt or not loop.last %}{{ '\n' }}{% endif %}{% endfor %}"
    r"{% if add_generation_prompt and messages[-1].role != 'assistant' %}{{ 'Falcon:' }}{% endif %}"
)
GLM4 = (
    r"{{ '[gMASK]<sop>' }}{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content }}{% endfor %}"
    r"{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
GPT_OSS = (
    SPLIT + r"{{ '<|start|>system<|message|>You are a large model.\nToday: ' + strftime_now('%B %Y') }}"
    r"{{ '\n\nReasoning: ' + (reasoning_effort or 'medium') + '\n\n# Channels: analysis, commentary, final.<|end|>' }}"
    r"{% if tools or system is not none %}{{ '<|start|>developer<|message|>' }}"
    r"{% if system is not none %}{{ '# Instructions\n\n' + system + '\n\n' }}{% endif %}"
    r"{% if tools %}{{ '# Tools\n\nnamespace functions {\n' }}{% for t in tools %}"
    r"{{ '// ' + t.function.description + '\ntype ' + t.function.name + ' = (_: any) => any;\n' }}{% endfor %}"
    r"{{ '}' }}{% endif %}"
    r"{{ '<|end|>' }}{% endif %}{% set ns = namespace(answered=false) %}{% for m in rest %}"
    r"{% if m.role == 'user' %}{{ '<|start|>user<|message|>' + m.content + '<|end|>' }}"
    r"{% elif m.role == 'tool' %}"
    r"{{ '<|start|>functions.' + m.name + ' to=assistant<|channel|>commentary<|message|>' + m.content | tojson + '<|end|>' }}"
    r"{% elif m.tool_calls %}{% set ns.answered = false %}"
    r"{% for o in rest[loop.index:] if o.role == 'assistant' and not o.tool_calls %}{% set ns.answered = true %}{% endfor %}"
    r"{% if m.content and m.thinking %}{{ raise_exception('A call has a content or a thought') }}{% endif %}"
    r"{% if (m.content or m.thinking) and not ns.answered %}"
    r"{{ '<|start|>assistant<|channel|>analysis<|message|>' + (m.content or m.thinking) + '<|end|>' }}{% endif %}"
    r"{% set f = m.tool_calls[0].function %}{{ '<|start|>assistant to=functions.' + f.name }}"
    r"{{ '<|channel|>commentary json<|message|>' + f.arguments | tojson + '<|call|>' }}"
    r"{% elif loop.last and not add_generation_prompt %}"
    r"{% if m.thinking %}{{ '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}{% endif %}"
    r"{{ '<|start|>assistant<|channel|>final<|message|>' + m.content + '<|return|>' }}"
    r"{% else %}{{ '<|start|>assistant<|channel|>final<|message|>' + m.content + '<|end|>' }}{% endif %}{% endfor %}"
    r"{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)
NEMOTRON = (
    SPLIT + r"{% set ns = namespace(on=true) %}{% for m in messages if m.role != 'assistant' %}"
    r"{% if '/think' in m.content %}{% set ns.on = true %}"
    r"{% elif '/no_think' in m.content %}{% set ns.on = false %}{% endif %}{% endfor %}"
    r"{{ '<SPECIAL_10>System\n' + (system or '').replace('/no_think', '').replace('/think', '').strip() + '\n\n' }}"
    r"{% set opening = '<SPECIAL_11>Assistant\n' + ('<think>\n\n' if ns.on else '<think></think>') %}{% for m in rest %}"
    r"{% if m.role == 'user' %}"
    r"{{ '<SPECIAL_11>User\n' + m.content.replace('/no_think', '').replace('/think', '').strip() + '\n' }}"
    r"{% elif loop.last %}{{ opening + m.content.strip() }}{{ '' if add_generation_prompt else '\n<SPECIAL_12>\n\n' }}"
    r"{% else %}{{ '<SPECIAL_11>Assistant\n' + m.content.split('</think>')[-1].strip() + '\n<SPECIAL_12>\n\n' }}{% endif %}"
    r"{% endfor %}{% if add_generation_prompt and rest[-1].role != 'assistant' %}{{ opening }}{% endif %}"
)
INTERNLM = (
    SPLIT + r"{{ bos_token }}{% if system is not none %}{{ '<|im_start|>system\n' + system + '<|im_end|>\n' }}{% endif %}"
    r"{% if tools %}{{ '<|im_start|>system name=<|plugin|>\n' + tools | map(attribute='function') | list | tojson }}"
    r"{{ '<|im_end|>\n' }}{% endif %}{% for m in rest %}"
    r"{{ '<|im_start|>' + ('environment name=<|plugin|>' if m.role == 'tool' else m.role) + '\n' + (m.content or '') }}"
    r"{% for c in m.tool_calls or [] %}"
    r"{{ '<|action_start|><|plugin|>\n' + c.function | tojson + '<|action_end|>' }}{% endfor %}"
    r"{{ '<|im_end|>\n' }}{% endfor %}" + ASSISTANT
)
YI = (
    SPLIT + r"{{ system or '' }}{% for m in rest %}{% if m.role == 'user' %}"
    r"{{ '<|im_start|>user\n' + m.content + '<|im_end|>\n<|im_start|>assistant\n' }}"
    r"{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
)
HERMES = (
    r"{{ bos_token }}{% if tools %}{{ '<|im_start|>system\nYou call functions. These are there: <tools>' }}"
    r"{% for t in tools %}{{ ('' if loop.first else '\n') + t.function | tojson }}{% endfor %}"
    r"{{ '</tools>\nWrite calls inside <tool_call></tool_call>.<|im_end|>\n' }}{% endif %}{% for m in messages %}"
    r"{% if m.role == 'tool' %}{% if m.name is not defined %}{{ raise_exception('A result names its function') }}{% endif %}"
    r"{{ '<|im_start|>tool\n<tool_response>\n' + {'name': m.name, 'content': m.content} | tojson }}"
    r"{{ '\n</tool_response><|im_end|>\n' }}{% elif m.tool_calls %}{{ '<|im_start|>assistant' }}"
    r"{% for c in m.tool_calls %}{{ '\n<tool_call>\n' + c.function | tojson + '\n</tool_call>' }}{% endfor %}"
    r"{{ '<|im_end|>\n' }}{% else %}" + TURN + r"{% endif %}{% endfor %}" + ASSISTANT
)
JAMBA = (
    SPLIT + r"{{ bos_token }}{% if system is not none or tools or documents %}{{ '<|bom|><|system|> ' + (system or '') }}"
    r"{% if tools %}{{ '\n<tool_definitions>' + tools | tojson + '</tool_definitions>' }}{% endif %}"
    r"{% if documents %}{{ '\n<documents>' + documents | tojson + '</documents>' }}{% endif %}{{ '<|eom|>' }}{% endif %}"
    r"{% for m in rest %}{{ '<|bom|><|' + m.role + '|> ' + (m.content or '') }}{% if m.tool_calls %}"
    r"{{ '<tool_calls>' + m.tool_calls | map(attribute='function') | list | tojson + '</tool_calls>' }}{% endif %}"
    r"{{ '<|eom|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|bom|><|assistant|>' }}{% endif %}"
)
BAICHUAN = (
    SPLIT + r"{{ (system or '') | trim }}{% for m in rest %}"
    r"{{ ('<reserved_106>' if m.role == 'user' else '<reserved_107>') + m.content }}{% endfor %}"
    r"{% if add_generation_prompt and messages[-1].role != 'assistant' %}{{ '<reserved_107>' }}{% endif %}"
)
OPENCHAT = (
    r"{{ bos_token }}{% for m in messages %}{{ 'GPT4 Correct ' + m.role.title() + ': ' + m.content + '<|end_of_turn|>' }}"
    r"{% endfor %}{% if add_generation_prompt %}{{ 'GPT4 Correct Assistant:' }}{% endif %}"
)
MARKED = (
    r"{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|im_start|>assistant\n' }}"
    r"{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    r"{% else %}" + TURN + r"{% endif %}{% endfor %}" + ASSISTANT
)
COUNTED = r"{{ 'A chat of ' ~ messages | length ~ ' messages.\n' }}" + CHATML
PROMPTED = (
    r"{% for m in messages %}{% if m.role != 'system' or add_generation_prompt %}"
    + TURN
    + r"{% endif %}{% endfor %}"
    + ASSISTANT
)

MISTRAL_TOOLS = ("[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]")
NO_THINKING = (("enable_thinking", False),)
V3_BOS, V3_EOS = DEEPSEEK[:2]

FAMILIES = (
    Family("chatml", CHATML, IM[1], specials=IM, eos=IM[1]),
    Family("qwen2.5", QWEN25, IM[1], specials=IM + CALL, eos=IM[1], tools=True),
    Family("qwen3", QWEN3, IM[1], specials=IM + CALL + THINK, eos=IM[1], tools=True, reasoning=True, options=NO_THINKING),
    Family(
        "qwen3.5", QWEN35, IM[1], opens="<think>\n", closes="\n</think>\n\n", specials=IM + CALL + THINK, eos=IM[1],
        tools=True, reasoning=True, leading=False, options=NO_THINKING,
    ),
    Family("qwq", QWQ, IM[1], opens="<think>\n", specials=IM + THINK, eos=IM[1]),
    Family(
        "llama-2", LLAMA2, " </s>", lead=" ", specials=("<s>", "</s>"), bos="<s>", eos="</s>", consecutive=False, leading=False,
    ),
    Family("llama-3", LLAMA3, LLAMA[3], specials=LLAMA, bos=LLAMA[0], eos=LLAMA[3]),
    Family("llama-3-early", LLAMA3_TURNS + LLAMA3_PROMPT, LLAMA[3], specials=LLAMA, bos=LLAMA[0], eos=LLAMA[3]),
    Family(
        "llama-3.1", LLAMA31, LLAMA[3], specials=LLAMA, bos=LLAMA[0], eos=LLAMA[3], tools=True,
        options=(("date_string", "1 Jan 2030"),),
    ),
    Family(
        "mistral-v0.1", MISTRAL1, "</s>", specials=("<s>", "</s>"), bos="<s>", eos="</s>", system=False, consecutive=False,
        leading=False,
    ),
    Family(
        "mistral-v0.2", MISTRAL2, "</s>", lead=" ", specials=("<s>", "</s>"), bos="<s>", eos="</s>", consecutive=False,
        leading=False,
    ),
    Family(
        "mistral-v0.3", mistral3(" ", r"' ' + m.content | trim"), "</s>", lead=" ", specials=INST + MISTRAL_TOOLS, bos="<s>",
        eos="</s>", tools=True, beside=False, consecutive=False, leading=False,
    ),
    Family(
        "mistral-nemo", mistral3("", r"m.content"), "</s>", specials=INST + MISTRAL_TOOLS, bos="<s>", eos="</s>", tools=True,
        beside=False, consecutive=False, leading=False,
    ),
    Family(
        "mistral-small", MISTRAL_SMALL, "</s>", specials=(*INST, "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"), bos="<s>", eos="</s>",
        consecutive=False, leading=False,
    ),
    Family("deepseek-v2", DEEPSEEK2, V3_EOS, lead=" ", specials=DEEPSEEK[:2], bos=V3_BOS, eos=V3_EOS, leading=False),
    Family("deepseek-v3", DEEPSEEK3, V3_EOS, specials=DEEPSEEK + DEEPSEEK_TOOLS, bos=V3_BOS, eos=V3_EOS, tools=True),
    Family(
        "deepseek-r1", DEEPSEEK_R1, V3_EOS, opens="<think>\n", specials=DEEPSEEK + DEEPSEEK_TOOLS + THINK, bos=V3_BOS,
        eos=V3_EOS,
    ),
    Family(
        "deepseek-v3.1", DEEPSEEK31, V3_EOS, specials=DEEPSEEK + DEEPSEEK_TOOLS + THINK, bos=V3_BOS, eos=V3_EOS, tools=True,
        leading=False, options=(("thinking", True),),
    ),
    Family("deepseek-coder", DEEPSEEK_CODER, "\n<|EOT|>", specials=(V3_BOS, "<|EOT|>"), bos=V3_BOS, eos="<|EOT|>"),
    Family("gemma", GEMMA1, GEMMA[3], specials=GEMMA, bos="<bos>", eos="<eos>", system=False, consecutive=False, leading=False),
    Family(
        "gemma-3", GEMMA3, GEMMA[3], specials=(*GEMMA, "<start_of_image>"), bos="<bos>", eos="<eos>", consecutive=False,
        leading=False, parts=True,
    ),
    Family(
        "phi-3", PHI3, "<|end|>", specials=("<s>", "<|endoftext|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"),
        bos="<s>", eos="<|endoftext|>",
    ),
    Family("phi-4", PHI4, IM[1], specials=(*IM, "<|im_sep|>"), eos=IM[1]),
    Family(
        "granite-3", GRANITE, "<|end_of_text|>", bos="<|end_of_text|>", eos="<|end_of_text|>", tools=True, documents=True,
        specials=("<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>", "<|tool_call|>"),
    ),
    Family("olmo-2", OLMO2, "<|endoftext|>", specials=("<|endoftext|>",), bos="<|endoftext|>", eos="<|endoftext|>"),
    Family("smollm2", SMOLLM2, IM[1], specials=IM, bos=IM[0], eos=IM[1]),
    Family("smollm3", SMOLLM3, IM[1], specials=IM + THINK, eos=IM[1], options=NO_THINKING),
    Family("zephyr", ZEPHYR, "</s>", specials=("<s>", "</s>"), bos="<s>", eos="</s>"),
    Family("vicuna", VICUNA, "</s>", lead=" ", specials=("<s>", "</s>"), bos="<s>", eos="</s>", leading=False),
    Family("alpaca", ALPACA, "</s>", specials=("<s>", "</s>"), bos="<s>", eos="</s>"),
    Family(
        "command-r", COMMAND_R, COHERE[2], specials=COHERE, bos=COHERE[0], eos=COHERE[2], documents=True, consecutive=False,
        leading=False,
    ),
    Family("falcon", FALCON, "", lead=" ", specials=("<|endoftext|>",), eos="<|endoftext|>", consecutive=False, leading=False),
    Family(
        "glm-4", GLM4, "", lead="\n", eos="<|endoftext|>", leading=False,
        specials=("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|endoftext|>"),
    ),
    Family(
        "gpt-oss", GPT_OSS, "<|return|>", lead="<|channel|>final<|message|>", call_end="<|call|>", eos="<|return|>", tools=True,
        reasoning=True, leading=False, options=(("reasoning_effort", "high"),),
        specials=("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>", "<|call|>"),
    ),
    Family(
        "nemotron", NEMOTRON, "\n<SPECIAL_12>", opens="<think>\n\n", specials=("<SPECIAL_10>", "<SPECIAL_11>", "<SPECIAL_12>"),
        eos="<SPECIAL_12>", consecutive=False, leading=False,
    ),
    Family(
        "internlm", INTERNLM, IM[1], bos="<s>", eos="</s>", tools=True,
        specials=(*IM, "<s>", "</s>", "<|plugin|>", "<|action_start|>", "<|action_end|>"),
    ),
    Family("yi", YI, IM[1], specials=IM, eos=IM[1], leading=False),
    Family("hermes", HERMES, IM[1], specials=(*IM, "<|begin_of_text|>"), bos="<|begin_of_text|>", eos=IM[1], tools=True),
    Family(
        "jamba", JAMBA, "<|eom|>", lead=" ", bos="<|startoftext|>", eos="<|endoftext|>", tools=True, documents=True,
        leading=False,
        specials=(
            "<|startoftext|>", "<|endoftext|>", "<|bom|>", "<|eom|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>",
            "<tool_calls>", "</tool_calls>",
        ),
    ),
    Family(
        "baichuan", BAICHUAN, "", specials=("<s>", "</s>", "<reserved_106>", "<reserved_107>"), bos="<s>", eos="</s>",
        consecutive=False, leading=False,
    ),
    Family(
        "openchat", OPENCHAT, "<|end_of_turn|>", lead=" ", specials=("<s>", "<|end_of_turn|>"), bos="<s>",
        eos="<|end_of_turn|>", leading=False,
    ),
    Family("marked", MARKED, IM[1], specials=IM, eos=IM[1]),
    Family("counted", COUNTED, IM[1], specials=IM, eos=IM[1]),
    Family("prompted", PROMPTED, IM[1], specials=IM, eos=IM[1]),
)  # fmt: skip
BY_NAME = {family.name: family for family in FAMILIES}
SPECIALS = tuple(dict.fromkeys(special for family in FAMILIES for special in family.specials))
