//! What is asked. The code is written as bytes, with its assembly beside it.

use std::time::Duration;

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES};
use kvm_ioctls::Kvm;

use super::guest::{self, Answer, DATA, END_PORT};
use super::{Instruction, Outcome, Speed};

/// One answer takes at most this long.
const LIMIT: Duration = Duration::from_secs(5);
/// A measurement is long enough to be one when it lasts this.
const ENOUGH: Duration = Duration::from_millis(50);

/// Measures a counted loop.
///
/// # Errors
/// Why it did not run.
pub fn speed(kvm: &Kvm) -> Result<Speed, String> {
    // again: mov ecx, esi; round: dec ecx; jnz round; out END_PORT, al; jmp again
    let code = [0x89, 0xf1, 0xff, 0xc9, 0x75, 0xfc, 0xe6, END_PORT, 0xeb, 0xf6];
    let (rounds, time) = guest::measure(kvm, &code, ENOUGH, LIMIT)?;
    let instructions = 2 * u64::from(rounds);
    let micros = u64::try_from(time.as_micros()).unwrap_or(u64::MAX).max(1);
    Ok(Speed { instructions, micros, instructions_per_second: instructions * 1_000_000 / micros })
}

/// Ends code: out END_PORT, al; jmp self.
fn ended(mut code: Vec<u8>) -> Vec<u8> {
    code.extend([0xe6, END_PORT, 0xeb, 0xfe]);
    code
}

/// A CPUID bit that an instruction depends on: leaf, register (0 = eax … 3 = edx), bit.
type Feature = (u32, usize, u32);

struct Question {
    name: &'static str,
    code: Vec<u8>,
    feature: Option<Feature>,
    xsave: bool,
    expected: Answer,
}

const XSAVE: Feature = (1, 2, 26);
const CMPXCHG16B: Feature = (1, 2, 13);
const POPCNT: Feature = (1, 2, 23);
const RDRAND: Feature = (1, 2, 30);
const SMAP: Feature = (7, 1, 20);
const INVPCID: Feature = (7, 1, 10);
const RDTSCP: Feature = (0x8000_0001, 3, 27);

fn questions() -> Vec<Question> {
    let [a, b, c, d] = DATA.to_le_bytes();
    let edi = [0xbf, a, b, c, d]; // mov edi, DATA
    // xor ecx, ecx; xor edx, edx; mov eax, 3; xsetbv: x87 and SSE state
    let xcr0 = [0x31, 0xc9, 0x31, 0xd2, 0xb8, 3, 0, 0, 0, 0x0f, 0x01, 0xd1];
    // mov eax, 3; xor edx, edx: the mask of xsave and xrstor
    let mask = [0xb8, 3, 0, 0, 0, 0x31, 0xd2];
    let with = |parts: &[&[u8]]| parts.concat();
    let plain =
        |name, code: Vec<u8>| Question { name, code, feature: None, xsave: false, expected: Answer::Reached };
    let needs = |name, feature, code: Vec<u8>| Question {
        name,
        code,
        feature: Some(feature),
        xsave: feature == XSAVE,
        expected: Answer::Reached,
    };
    vec![
        plain("cpuid", vec![0x31, 0xc0, 0x0f, 0xa2]),
        plain("rdtsc", vec![0x0f, 0x31]),
        // mov ecx, EFER; rdmsr
        plain("rdmsr", vec![0xb9, 0x80, 0, 0, 0xc0, 0x0f, 0x32]),
        // mov ecx, KERNEL_GS_BASE; xor eax, eax; xor edx, edx; wrmsr
        plain("wrmsr", vec![0xb9, 0x02, 0x01, 0, 0xc0, 0x31, 0xc0, 0x31, 0xd2, 0x0f, 0x30]),
        plain("swapgs", vec![0x0f, 0x01, 0xf8]),
        plain("mov cr3", vec![0x0f, 0x20, 0xd8, 0x0f, 0x22, 0xd8]),
        plain("mov cr4", vec![0x0f, 0x20, 0xe0, 0x0f, 0x22, 0xe0]),
        // mov eax, 0x400; mov dr7, rax
        plain("mov dr7", vec![0xb8, 0, 4, 0, 0, 0x0f, 0x23, 0xf8]),
        plain("invlpg", with(&[&edi, &[0x0f, 0x01, 0x3f]])),
        // sgdt [rdi]; lgdt [rdi]
        plain("lgdt", with(&[&edi, &[0x0f, 0x01, 0x07, 0x0f, 0x01, 0x17]])),
        // mov rax, rsp; push 0x18; push rax; pushfq; push 0x10; lea rax, [rip + 3]; push rax; iretq
        plain(
            "iretq",
            vec![
                0x48, 0x89, 0xe0, 0x6a, 0x18, 0x50, 0x9c, 0x6a, 0x10, 0x48, 0x8d, 0x05, 3, 0, 0, 0, 0x50,
                0x48, 0xcf,
            ],
        ),
        Question {
            name: "int3",
            code: vec![0xcc],
            feature: None,
            xsave: false,
            expected: Answer::Exception(3),
        },
        Question {
            name: "ud2",
            code: vec![0x0f, 0x0b],
            feature: None,
            xsave: false,
            expected: Answer::Exception(6),
        },
        plain("mfence", vec![0x0f, 0xae, 0xf0]),
        // mov [rdi], ds; verw [rdi]
        plain("verw", with(&[&edi, &[0x8c, 0x1f, 0x0f, 0x00, 0x2f]])),
        // movdqa xmm0, [rdi]
        plain("movdqa", with(&[&edi, &[0x66, 0x0f, 0x6f, 0x07]])),
        // fxsave64 [rdi]; fxrstor64 [rdi]
        plain("fxrstor", with(&[&edi, &[0x48, 0x0f, 0xae, 0x07, 0x48, 0x0f, 0xae, 0x0f]])),
        needs("lock cmpxchg16b", CMPXCHG16B, with(&[&edi, &[0xf0, 0x48, 0x0f, 0xc7, 0x0f]])),
        needs("popcnt", POPCNT, vec![0xf3, 0x48, 0x0f, 0xb8, 0xc0]),
        needs("rdrand", RDRAND, vec![0x48, 0x0f, 0xc7, 0xf0]),
        needs("rdtscp", RDTSCP, vec![0x0f, 0x01, 0xf9]),
        needs("clac", SMAP, vec![0x0f, 0x01, 0xca]),
        needs("stac", SMAP, vec![0x0f, 0x01, 0xcb]),
        // mov eax, 2 (all contexts); invpcid rax, [rdi]
        needs("invpcid", INVPCID, with(&[&edi, &[0xb8, 2, 0, 0, 0, 0x66, 0x0f, 0x38, 0x82, 0x07]])),
        needs("xsetbv", XSAVE, xcr0.to_vec()),
        // xsave64 [rdi]
        needs("xsave", XSAVE, with(&[&xcr0, &mask, &edi, &[0x48, 0x0f, 0xae, 0x27]])),
        // xrstor64 [rdi]: a zeroed area is the initial state
        needs("xrstor", XSAVE, with(&[&xcr0, &mask, &edi, &[0x48, 0x0f, 0xae, 0x2f]])),
    ]
}

/// Machines at a time: making and unmaking one is mostly waiting.
const AT_A_TIME: usize = 8;

/// Tries every instruction.
pub fn instructions(kvm: &Kvm) -> Vec<Instruction> {
    let cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).ok();
    let (questions, cpuid) = (questions(), cpuid.as_ref());
    let share = questions.len().div_ceil(AT_A_TIME);
    std::thread::scope(|scope| {
        let workers: Vec<_> = questions
            .chunks(share)
            .map(|some| scope.spawn(move || some.iter().map(|one| ask(kvm, cpuid, one)).collect::<Vec<_>>()))
            .collect();
        workers.into_iter().flat_map(|worker| worker.join().unwrap_or_default()).collect()
    })
}

fn ask(kvm: &Kvm, cpuid: Option<&CpuId>, question: &Question) -> Instruction {
    let name = question.name.to_owned();
    if !question.feature.is_none_or(|feature| cpuid.is_some_and(|cpuid| offers(cpuid, feature))) {
        return Instruction { name, outcome: Outcome::NotOffered, why: None };
    }
    let (outcome, why) = match guest::run(kvm, &ended(question.code.clone()), question.xsave, LIMIT) {
        Ok(answer) if answer == question.expected => (Outcome::Ok, None),
        Ok(Answer::Reached) => {
            (Outcome::Failed, Some("the exception that it should raise does not come".into()))
        }
        Ok(answer) => answer.judged(),
        Err(why) => (Outcome::Failed, Some(why)),
    };
    Instruction { name, outcome, why }
}

fn offers(cpuid: &CpuId, (leaf, register, bit): Feature) -> bool {
    cpuid.as_slice().iter().find(|entry| entry.function == leaf && entry.index == 0).is_some_and(|entry| {
        let registers = [entry.eax, entry.ebx, entry.ecx, entry.edx];
        registers[register] >> bit & 1 == 1
    })
}
