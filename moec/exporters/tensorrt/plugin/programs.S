/* The programs of all sizes, one after the other, as part of the library. */
    .section .rodata
    .balign 64
    .globl moec_programs
    .hidden moec_programs
moec_programs:
    .incbin "programs.bin"
    .globl moec_programs_end
    .hidden moec_programs_end
moec_programs_end:
    .section .note.GNU-stack,"",%progbits  /* nothing here is to be executed on the stack */
