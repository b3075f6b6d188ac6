"""Chat templates in the style of some models, for the tests, and a stranger's that mean no good."""

ZEPHYR = """{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\\n' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>\\n' + message['content'] + eos_token }}
{% else %}
{{ '<|assistant|>\\n' + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""

VICUNA = """{{ bos_token }}
{%- for message in messages -%}
{%- if message.role == 'system' -%}{{ message.content | trim ~ ' ' }}
{%- elif message.role == 'user' -%}{{ 'USER: ' + message.content | trim + ' ' }}
{%- else -%}{{ 'ASSISTANT: ' + (message.content | trim) + eos_token }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif -%}"""

# Its end token is an added one, and the folder calls it `eos_token`; the system speaks in the last question.
CHATML = """{% set ns = namespace(system='') %}
{% for m in messages if m['role'] == 'system' %}
{% set ns.system = m['content'] ~ '\\n' %}
{% endfor %}
{% for m in messages if m['role'] != 'system' %}
{{- '<|im_start|>' + m['role'] + '\\n' }}
{{- ns.system if loop.last and m['role'] == 'user' }}
{{- m['content'] + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif -%}"""

# No token ends an answer.
BARE = """{% for m in messages %}{{ '### ' + m.role | upper + ': ' + m.content | trim + '\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '### ASSISTANT:' }}{% endif -%}"""

# LLaMA 2's, and two with its tags that are not.
LLAMA2 = """{% set first = messages[0].role == 'system' %}
{% set system = '<<SYS>>\\n' + messages[0].content + '\\n<</SYS>>\\n\\n' if first else '' %}
{% for m in messages if m.role != 'system' %}
{%- set text = (system if loop.first else '') + m.content %}
{%- if m.role == 'user' %}{{ bos_token + ' [INST] ' + text.strip() + ' [/INST]' }}
{%- else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}
{%- endfor %}"""
NO_SPACES = LLAMA2.replace("'[INST] '", "'[INST]'").replace("' [/INST]'", "'[/INST]'")
ONE_BEGIN = LLAMA2.replace("bos_token + ' [INST] '", "(bos_token if loop.first else '') + ' [INST] '")

GROWING = "{%% set ns = namespace(x='a', y=[1]) %%}{%% for i in range(90) %%}%s{%% endfor %%}{{ ns.x }}"
HOSTILE = [
    "{% for i in range(99999) %}" * 3 + "{% endfor %}" * 3,
    "{% for i in range(99999) %}{{ range(99999) | list | length }}{% endfor %}",
    "{% for i in range(10000000000) %}{% endfor %}",
    "{% for i in [messages] recursive %}{{ loop([messages]) }}{% endfor %}",
    "{% macro f(n) %}{{ f(n + 1) }}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
    "{% macro f(n) %}{% if n < 40 %}{{ f(n + 1) }}{{ f(n + 1) }}{% endif %}{% endmacro %}{{ f(0) }}",
    "{% for i in range(99999) %}" + "x" * 9999 + "{% endfor %}",
    "{% set x %}{% for i in range(99999) %}" + "x" * 9999 + "{% endfor %}{% endset %}",
    "{{ 'a' * 9999999999 }}", "{{ [1] * 9999999999 }}", "{{ 9 ** 9 ** 9 }}", "{{ '%9999999999d' % 1 }}",
    "{{ 'a' | center(9999999999) }}", "{{ 'a'.center(9999999999) }}", "{{ '{:9999999999d}'.format(1) }}",
    "{{ 'a' | indent(9999999999) }}", "{{ {} | tojson(indent=9999999999) }}",
    "{{ range(9) | map('center', 9999999999) | list }}",
    *(GROWING % step for step in (
        "{% set ns.x = ns.x ~ ns.x %}", "{% set ns.x = ns.x + ns.x %}",
        "{% set ns.x %}{{ ns.x }}{{ ns.x }}{% endset %}",
        "{% set ns.x = ns.x.replace('a', 'aaa') %}", "{% set ns.x = ns.x | replace('a', 'aaa') %}",
        "{% set ns.x = ns.x.join([ns.x, ns.x, ns.x]) %}", "{% set ns.x = [ns.x, ns.x] | join(ns.x) %}",
        "{% set ns.y = [ns.y, ns.y] %}", "{% set ns.y = ns.y + ns.y %}")),
    "{% set ns = namespace(x=3) %}{% for i in range(90) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "{% with x = 'a' %}" * 5000, "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "x" * 200_000,
    "{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ messages.append(1) }}", "{{ self.__init__.__globals__ }}",
    "{% include 'secret' %}", "{% import 'os' as os %}", "{{ cycler.__init__.__globals__.os.system('true') }}",
    "{{ raise_exception('no system, please') }}", "{{ 1 / 0 }}", "{{ nothing.at.all }}", "{% if %}",
]
