//! Makes a filter's program (classic BPF, `seccomp(2)`) from lines of rules.
//!
//! ```text
//!   architecture ── another one ─▶ trap
//!        │
//!   the call's number: a binary search ──▶ is not there ─▶ trap
//!        │
//!   its body: allow, or compare arguments one after the other
//! ```
//! The search is why this is done here: when a filter is installed, the kernel runs it once for each call that there is, to remember
//! which are always allowed, and the chain of comparisons that other compilers make is most of a filter's price then (`docs/performance.md`).

use libc::{
    BPF_ABS, BPF_JA, BPF_JEQ, BPF_JGE, BPF_JMP, BPF_JSET, BPF_K, BPF_LD, BPF_RET, BPF_W, SECCOMP_RET_ALLOW,
    SECCOMP_RET_TRAP, sock_filter,
};

use super::rules::Only;

/// `AUDIT_ARCH_X86_64`.
const ARCHITECTURE: u32 = 0xc000_003e;
/// Where `struct seccomp_data` has the call's number, the architecture, and the lower halves of the arguments.
const NUMBER_AT: u32 = 0;
const ARCHITECTURE_AT: u32 = 4;
const ARGUMENTS_AT: u32 = 16;
const PROT_EXEC: u32 = libc::PROT_EXEC.cast_unsigned();
/// What the kernel takes (`BPF_MAXINSNS`).
const MOST: usize = 4096;

const ALLOW: sock_filter = statement(BPF_RET | BPF_K, SECCOMP_RET_ALLOW);
const TRAP: sock_filter = statement(BPF_RET | BPF_K, SECCOMP_RET_TRAP);

/// The program that allows these calls to process `process`. `None`: there are more lines than a program can hold.
pub fn compile(lines: &[(i64, Only)], process: u32) -> Option<Vec<sock_filter>> {
    let mut calls: Vec<(u32, Vec<Only>)> = Vec::new();
    for (call, only) in lines {
        let call = u32::try_from(*call).ok()?;
        match calls.binary_search_by_key(&call, |(number, _)| *number) {
            Ok(at) => calls[at].1.push(*only),
            Err(at) => calls.insert(at, (call, vec![*only])),
        }
    }
    let mut program = vec![load(ARCHITECTURE_AT), jump(BPF_JEQ, ARCHITECTURE, 1, 0), TRAP, load(NUMBER_AT)];
    program.extend(search(&calls, process)?);
    (program.len() <= MOST).then_some(program)
}

/// Ends for every number: with a call's body, or with a trap.
fn search(calls: &[(u32, Vec<Only>)], process: u32) -> Option<Vec<sock_filter>> {
    match calls {
        [] => Some(vec![TRAP]),
        [(number, only)] => {
            let mut code = vec![jump(BPF_JEQ, *number, 1, 0), TRAP];
            code.extend(body(only, process)?);
            Some(code)
        }
        _ => {
            let (below, above) = calls.split_at(calls.len() / 2);
            let (left, right) = (search(below, process)?, search(above, process)?);
            let mut code = vec![
                jump(BPF_JGE, above[0].0, 0, 1),
                // Distances of conditional jumps end at 255.
                statement(BPF_JMP | BPF_JA, u32::try_from(left.len()).ok()?),
            ];
            code.extend(left);
            code.extend(right);
            Some(code)
        }
    }
}

/// Allows when one of the lines does.
fn body(only: &[Only], process: u32) -> Option<Vec<sock_filter>> {
    if only.contains(&Only::Any) {
        return Some(vec![ALLOW]);
    }
    let (mut code, mut loaded) = (Vec::new(), None);
    for line in only {
        let (argument, test, value) = match *line {
            Only::Any => continue,
            Only::Argument(argument, value) => (argument, BPF_JEQ, u32::try_from(value & 0xffff_ffff).ok()?),
            Only::NotExecutable => (2, BPF_JSET, PROT_EXEC),
            Only::ThisProcess => (0, BPF_JEQ, process),
        };
        if loaded.replace(argument) != Some(argument) {
            code.push(load(ARGUMENTS_AT + 8 * u32::from(argument)));
        }
        // Met: over the trap to the end. A protection is fine when the bit is not set.
        code.push(if test == BPF_JSET { jump(test, value, 1, 0) } else { jump(test, value, 0, 1) });
        code.push(ALLOW);
    }
    code.push(TRAP);
    Some(code)
}

#[allow(clippy::cast_possible_truncation, reason = "an instruction's code has 16 bits")]
const fn statement(code: u32, value: u32) -> sock_filter {
    sock_filter { code: code as u16, jt: 0, jf: 0, k: value }
}

const fn load(at: u32) -> sock_filter {
    statement(BPF_LD | BPF_W | BPF_ABS, at)
}

const fn jump(test: u32, value: u32, met: u8, not: u8) -> sock_filter {
    sock_filter { jt: met, jf: not, ..statement(BPF_JMP | test | BPF_K, value) }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::seccomp::rules::{self, Kind};

    /// What the kernel does with a program: the result, and how many instructions it took.
    fn run(program: &[sock_filter], call: u32, arguments: &[u64; 6], architecture: u32) -> (u32, usize) {
        let (mut at, mut word, mut steps) = (0, 0, 0);
        loop {
            let sock_filter { code, jt, jf, k } = program[at];
            (at, steps) = (at + 1, steps + 1);
            let code = u32::from(code);
            let mut branch = |met: bool| at += usize::from(if met { jt } else { jf });
            match code {
                _ if code == BPF_LD | BPF_W | BPF_ABS => {
                    word = match k {
                        NUMBER_AT => call,
                        ARCHITECTURE_AT => architecture,
                        _ => {
                            assert_eq!((k - ARGUMENTS_AT) % 8, 0);
                            (arguments[(k - ARGUMENTS_AT) as usize / 8] & 0xffff_ffff) as u32
                        }
                    }
                }
                _ if code == BPF_RET | BPF_K => return (k, steps),
                _ if code == BPF_JMP | BPF_JA => at += k as usize,
                _ if code == BPF_JMP | BPF_JEQ | BPF_K => branch(word == k),
                _ if code == BPF_JMP | BPF_JGE | BPF_K => branch(word >= k),
                _ if code == BPF_JMP | BPF_JSET | BPF_K => branch(word & k != 0),
                other => panic!("instruction {other:#x}"),
            }
        }
    }

    const PROCESS: u32 = 4711;

    fn allows(program: &[sock_filter], call: u32, arguments: &[u64; 6]) -> bool {
        run(program, call, arguments, ARCHITECTURE).0 == SECCOMP_RET_ALLOW
    }

    /// Arguments that the tables know, and others.
    fn some_arguments(kind: Kind) -> Vec<[u64; 6]> {
        let mut all =
            vec![[0; 6], [u64::MAX; 6], [u64::from(PROCESS); 6], [0, 0, 4, 0, 0, 0], [0, 0, 3, 0, 0, 0]];
        for line in rules::allowed(kind) {
            if let Only::Argument(argument, value) = line.only {
                for value in [value, value + 1, value | 1 << 40] {
                    let mut arguments = [0; 6];
                    arguments[usize::from(argument)] = value;
                    all.push(arguments);
                }
            }
        }
        all
    }

    #[test]
    fn a_program_allows_what_its_table_says_and_nothing_else() {
        for kind in [Kind::Api, Kind::Devices, Kind::Disk, Kind::Vcpu, Kind::Opener] {
            let program = compile(&rules::lines(kind), PROCESS).unwrap();
            let arguments = some_arguments(kind);
            for call in (0..600).chain([0x4000_0000, 0x4000_0010, u32::MAX]) {
                let lines: Vec<_> =
                    rules::allowed(kind).filter(|line| line.call == i64::from(call)).collect();
                for arguments in &arguments {
                    let expected = lines.iter().any(|line| line.only.takes(arguments, PROCESS));
                    assert_eq!(allows(&program, call, arguments), expected, "{kind:?} {call} {arguments:x?}");
                }
            }
            // Another architecture's numbers mean other calls.
            let read = u32::try_from(libc::SYS_read).unwrap();
            assert_eq!(run(&program, read, &[0; 6], 0x4000_0003).0, SECCOMP_RET_TRAP);
        }
    }

    #[test]
    fn a_call_is_found_in_few_steps() {
        for kind in [Kind::Api, Kind::Devices, Kind::Disk, Kind::Vcpu] {
            let program = compile(&rules::lines(kind), PROCESS).unwrap();
            for call in 0..600 {
                // A call whose arguments are compared is not remembered by the kernel anyway.
                let compares =
                    rules::allowed(kind).any(|line| line.call == i64::from(call) && line.only != Only::Any);
                let steps = run(&program, call, &[u64::MAX; 6], ARCHITECTURE).1;
                assert!(compares || steps <= 20, "{kind:?}: {steps} steps for call {call}");
            }
        }
    }

    proptest! {
        #[test]
        fn any_table_becomes_a_program_that_says_the_same(
            lines in prop::collection::vec(
                (0_i64..40, prop_oneof![
                    Just(Only::Any),
                    (0_u8..6, 0_u64..5).prop_map(|(argument, value)| Only::Argument(argument, value)),
                    Just(Only::NotExecutable),
                    Just(Only::ThisProcess),
                ]),
                0..60,
            ),
            call in 0_u32..42,
            arguments in prop::array::uniform6(prop_oneof![0_u64..6, Just(u64::from(PROCESS)), any::<u64>()]),
        ) {
            let program = compile(&lines, PROCESS).unwrap();
            let expected = lines.iter().any(|(number, only)| *number == i64::from(call) && only.takes(&arguments, PROCESS));
            prop_assert_eq!(allows(&program, call, &arguments), expected);
        }
    }
}
