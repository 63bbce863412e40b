"""DeepSeek's special tokens, spelt as published: full-width bars (U+FF5C) and U+2581 between words.

In: nothing. Out: their names, and RESERVED, the list that every tokenizer trained here begins with (DeepSeek-V3 report,
section 4.1 for the fill-in-the-middle tokens; tokenizer.json of the published checkpoint for the rest).
"""

BEGIN = "<｜begin▁of▁sentence｜>"
END = "<｜end▁of▁sentence｜>"
PAD = "<｜▁pad▁｜>"

THINK_BEGIN = "<think>"
THINK_END = "</think>"

FIM_HOLE = "<｜fim▁hole｜>"
FIM_BEGIN = "<｜fim▁begin｜>"
FIM_END = "<｜fim▁end｜>"

USER = "<｜User｜>"
ASSISTANT = "<｜Assistant｜>"

TOOL_CALLS_BEGIN = "<｜tool▁calls▁begin｜>"
TOOL_CALLS_END = "<｜tool▁calls▁end｜>"
TOOL_CALL_BEGIN = "<｜tool▁call▁begin｜>"
TOOL_CALL_END = "<｜tool▁call▁end｜>"
TOOL_OUTPUTS_BEGIN = "<｜tool▁outputs▁begin｜>"
TOOL_OUTPUTS_END = "<｜tool▁outputs▁end｜>"
TOOL_OUTPUT_BEGIN = "<｜tool▁output▁begin｜>"
TOOL_OUTPUT_END = "<｜tool▁output▁end｜>"
TOOL_SEPARATOR = "<｜tool▁sep｜>"

# The order is part of the format: a tokenizer trained here gives RESERVED[i] the id i, whatever its vocabulary size.
# Begin, end and pad are 0, 1, 2 as in DeepSeek's own files.
RESERVED = (
    BEGIN,
    END,
    PAD,
    THINK_BEGIN,
    THINK_END,
    FIM_HOLE,
    FIM_BEGIN,
    FIM_END,
    USER,
    ASSISTANT,
    TOOL_CALLS_BEGIN,
    TOOL_CALLS_END,
    TOOL_CALL_BEGIN,
    TOOL_CALL_END,
    TOOL_OUTPUTS_BEGIN,
    TOOL_OUTPUTS_END,
    TOOL_OUTPUT_BEGIN,
    TOOL_OUTPUT_END,
    TOOL_SEPARATOR,
)

# Only these are flagged "special" and so left out of decoded text. The others stay visible there, as in DeepSeek's own
# tokenizer.json: whoever reads a reply has to see where its thinking ends and where a tool call begins.
HIDDEN = frozenset({BEGIN, END, PAD})
