"""PTX of small kernels, as tests write it."""

KERNEL = """
.visible .entry kernel(
{parameters}
)
.reqntid {threads}
{{
	.reg .pred %p<9>;
	.reg .b16 %rs<9>;
	.reg .b32 %r<9>;
	.reg .b64 %rd<20>;
{body}
	ret;
}}
"""
# Every thread has its number in %r0, and addresses of its element of every array in %rd0...
THREAD = "mov.u32 %r0, %tid.x;"
SHARED = ".extern .shared .align 16 .b8 memory[];\n"
