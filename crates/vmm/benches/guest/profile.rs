//! Where the instructions of a boot go, by function. The virtual host's QEMU counts how often each block of instructions is run
//! (`count.c`), in two runs, of which the second boots more guests: the difference is theirs.

use std::collections::BTreeMap;
use std::fs;

use serde_json::json;

use crate::boots::SYMBOL;

/// Where an x86-64 Linux kernel of which nobody moved the addresses begins, as the guest's.
const GUEST: u64 = 0xffff_ffff_8100_0000;
/// Bytes of a guest's kernel that does not say where it ends, at most.
const MOST: u64 = 32 << 20;
/// Where addresses of a kernel begin.
const KERNEL: u64 = 0xffff_8000_0000_0000;
/// Functions that are shown of each kernel.
const SHOWN: usize = 15;

/// Functions by address.
struct Symbols(Vec<(u64, String)>);

impl Symbols {
    /// Of lines `ADDRESS KIND NAME`, and more words.
    fn of<'a>(lines: impl Iterator<Item = &'a str>) -> Self {
        let symbol = |line: &str| {
            let mut words = line.split_whitespace();
            let address = u64::from_str_radix(words.next()?, 16).ok()?;
            let kind = words.next()?;
            let name = words.next()?;
            (kind.eq_ignore_ascii_case("t") || name == "_end").then(|| (address, name.to_owned()))
        };
        let mut all: Vec<_> = lines.filter_map(symbol).collect();
        all.sort();
        Self(all)
    }

    fn name(&self, address: u64) -> &str {
        let next = self.0.partition_point(|(begin, _)| *begin <= address);
        next.checked_sub(1).map_or("", |index| self.0[index].1.as_str())
    }

    fn address(&self, name: &str) -> Option<u64> {
        self.0.iter().find(|(_, known)| known == name).map(|(address, _)| *address)
    }
}

/// Whose instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Part {
    Guest,
    Host,
    Programs,
}

/// Instructions by function.
type Counts = BTreeMap<(Part, String), i64>;

/// Adds one run's counts, `sign` times.
fn add(counts: &mut Counts, run: &str, guest: &Symbols, sign: i64) -> Result<(), String> {
    let console = fs::read_to_string(run).map_err(|error| format!("{run}: {error}"))?;
    let host = Symbols::of(console.lines().filter_map(|line| line.strip_prefix(SYMBOL)));
    let end = guest.address("_end").unwrap_or(GUEST + MOST);
    let begin =
        host.address("_text").ok_or_else(|| format!("{run}: the host did not say where its kernel is"))?;
    if begin < end {
        return Err("the host's kernel lies where the guest's does, as chance has it: run it again".into());
    }
    let blocks = format!("{run}.counts");
    let text = fs::read_to_string(&blocks).map_err(|error| format!("{blocks}: {error}"))?;
    for line in text.lines() {
        let mut words = line.split(' ');
        let address = words.next().and_then(|word| u64::from_str_radix(word, 16).ok());
        let mut number = || words.next().and_then(|word| word.parse::<i64>().ok());
        let (Some(address), Some(instructions), Some(times)) = (address, number(), number()) else {
            return Err(format!("{blocks}: {line:?} is no block"));
        };
        let (part, name) = match address {
            GUEST.. if address < end => (Part::Guest, guest.name(address)),
            KERNEL.. => (Part::Host, host.name(address)),
            _ => (Part::Programs, ""),
        };
        *counts.entry((part, name.to_owned())).or_default() += sign * instructions * times;
    }
    Ok(())
}

/// Prints what both runs differ by, for each of the `more` guests of the second one.
///
/// # Errors
/// A file is missing or no such file.
pub fn print(format: &str, [first, second]: [&str; 2], more: f64, map: &str) -> Result<(), String> {
    let text = fs::read_to_string(map).unwrap_or_else(|error| {
        eprintln!("warning: {map}: {error}: without it the guest's functions have no names");
        String::new()
    });
    let guest = Symbols::of(text.lines());
    let mut counts = Counts::new();
    add(&mut counts, first, &guest, -1)?;
    add(&mut counts, second, &guest, 1)?;
    let millions = |count: i64| count as f64 / more / 1e6;
    let parts =
        [(Part::Guest, "guest's kernel"), (Part::Host, "host's kernel"), (Part::Programs, "programs")];
    let mut all = Vec::new();
    for (part, title) in parts {
        let mut functions: Vec<(i64, &str)> = counts
            .iter()
            .filter(|((whose, _), _)| *whose == part)
            .map(|((_, name), count)| (*count, name.as_str()))
            .collect();
        functions.sort_by(|one, other| other.cmp(one));
        let sum = millions(functions.iter().map(|(count, _)| count).sum());
        functions.retain(|(_, name)| !name.is_empty());
        functions.truncate(SHOWN);
        all.push((title, sum, functions));
    }
    if format == "json" {
        let one = |(title, sum, functions): &(&str, f64, Vec<(i64, &str)>)| {
            let functions: BTreeMap<&str, f64> =
                functions.iter().map(|(count, name)| (*name, millions(*count))).collect();
            json!({ "part": title, "millions": sum, "functions": functions })
        };
        println!("{}", json!({ "instructions of a boot": all.iter().map(one).collect::<Vec<_>>() }));
        return Ok(());
    }
    println!("| instructions of a boot, and of its end | millions |\n|---|---|");
    for (title, sum, functions) in &all {
        println!("| **{title}** | {sum:.1} |");
        for (count, name) in functions {
            println!("| `{name}` | {:.2} |", millions(*count));
        }
    }
    Ok(())
}
