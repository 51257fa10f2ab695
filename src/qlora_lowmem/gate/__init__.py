"""The gate: what tests and recipes may need, judged to the byte."""

# The plugin that judges goes by this name; a process that runs one test for it blocks the name.
JUDGE = "qlora_lowmem-judge"
# The attribute of a report that carries a row; pytest's own serialisation takes it from process to process.
REPORT_ATTRIBUTE = "qlora_lowmem_row"
