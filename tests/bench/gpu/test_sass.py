"""Counts of a listing of instructions."""

from bench.gpu.sass import instructions

# Two nested loops, the code of a parted warp, which jumps back, and what follows every kernel.
LISTING = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;        /* 0x00000a0000017a02 */
                                                                 /* 0x000fe40000000f00 */
        /*0010*/              @!P0 IADD3 R2, R2, 0x1, RZ ;
        /*0020*/                   BRA.DIV UR4, 0x80 ;
        /*0030*/                   FADD R3, R3, R2 ;
        /*0040*/               @P1 BRA 0x20 ;
        /*0050*/                   NOP ;
        /*0060*/              @!P2 BRA P3, 0x10 ;
        /*0070*/                   EXIT ;
        /*0080*/                   SHFL.BFLY P2, R4, R5, R6, R7 ;
        /*0090*/                   BRA 0x30 ;
        /*00a0*/                   BRA 0xa0;
        /*00b0*/                   NOP;
"""


def test_instructions_apart_and_loops():
    assert instructions(LISTING) == (9, 2, [3])
