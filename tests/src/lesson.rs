//! Runs the `console` blocks of a page in order, with one shell per section, and compares their
//! output with the page's.
//!
//! In a block, `$ ` begins a command and `> ` continues it. The lines below are its output (stdout
//! and stderr). There, `…` stands for any text within a line, and a line `…` for any number of
//! lines.

use std::process::{Command, Stdio};

/// A section of a page: its heading and its commands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Section {
    pub heading: String,
    pub steps: Vec<Step>,
}

/// A command and its output.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Step {
    pub command: String,
    pub expected: Vec<String>,
}

/// The sections of a page that have commands.
#[must_use]
pub fn sections(page: &str) -> Vec<Section> {
    let mut sections: Vec<Section> = vec![Section { heading: String::new(), steps: Vec::new() }];
    let mut in_block = false;
    for line in page.lines() {
        let section = sections.last_mut().unwrap();
        if let Some(kind) = line.strip_prefix("```") {
            in_block = kind == "console";
        } else if in_block {
            if let Some(command) = line.strip_prefix("$ ") {
                section.steps.push(Step { command: command.to_owned(), expected: Vec::new() });
            } else {
                let step =
                    section.steps.last_mut().unwrap_or_else(|| panic!("output before a command: {line}"));
                match line.strip_prefix('>') {
                    Some(more) if step.expected.is_empty() => {
                        step.command.push('\n');
                        step.command.push_str(more.strip_prefix(' ').unwrap_or(more));
                    }
                    _ => step.expected.push(line.to_owned()),
                }
            }
        } else if let Some(heading) = line.strip_prefix("## ") {
            sections.push(Section { heading: heading.to_owned(), steps: Vec::new() });
        }
    }
    sections.retain(|section| !section.steps.is_empty());
    sections
}

/// Returns true if a line matches the page's, where `…` stands for any text.
fn line_matches(pattern: &str, line: &str) -> bool {
    let Some((before, rest)) = pattern.split_once('…') else { return pattern == line };
    let Some(mut line) = line.strip_prefix(before) else { return false };
    let mut parts: Vec<&str> = rest.split('…').collect();
    let last = parts.pop().unwrap_or("");
    for part in parts {
        match line.split_once(part) {
            Some((_, after)) => line = after,
            None => return false,
        }
    }
    line.ends_with(last)
}

/// Returns true if lines match the page's.
#[must_use]
pub fn matches(expected: &[String], lines: &[&str]) -> bool {
    match (expected.split_first(), lines.split_first()) {
        (None, None) => true,
        (Some((pattern, more)), _) if pattern == "…" => {
            (0..=lines.len()).any(|skipped| matches(more, &lines[skipped..]))
        }
        (Some((pattern, more)), Some((line, rest))) => line_matches(pattern, line) && matches(more, rest),
        _ => false,
    }
}

/// Separates the outputs of two commands; no program prints it.
const END: &str = "\u{1e}";

/// Runs a section in a `bash` that the caller has prepared (directory, environment).
///
/// # Errors
/// The first command whose output differs from the page, with both.
#[track_caller]
pub fn run(section: &Section, shell: &mut Command) -> Result<(), String> {
    let mut script = String::from("exec 2>&1\n");
    for step in &section.steps {
        script.push_str(&format!("{}\nprintf '{END}'\n", step.command));
    }
    let output = shell.arg("-c").arg(script).stdin(Stdio::null()).output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout).replace('\r', "");
    let mut parts = said.split(END);
    for step in &section.steps {
        let lines: Vec<&str> = parts.next().unwrap_or("").lines().collect();
        if !matches(&step.expected, &lines) {
            return Err(format!(
                "in \"{}\":\n$ {}\nthe page shows:\n{}\nit printed:\n{}",
                section.heading,
                step.command,
                step.expected.join("\n"),
                lines.join("\n")
            ));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: &str = "# Page\ntext\n## First\n```console\n$ X=3\n$ echo \"a $X\"; echo b\na …\nb\n$ cat <<'E'\n> one\n> two\n> E\n…\ntwo\n```\n```sh\nnot run\n```\n## None\n";

    #[test]
    fn a_page_is_run_in_one_shell_and_compared() {
        let sections = sections(PAGE);
        assert_eq!(sections.len(), 1);
        assert_eq!(sections[0].steps.len(), 3);
        assert_eq!(run(&sections[0], &mut Command::new("bash")), Ok(()));
        let mut wrong = sections[0].clone();
        wrong.steps[1].expected[0] = "a 4".to_owned();
        let told = run(&wrong, &mut Command::new("bash")).unwrap_err();
        assert!(told.contains("the page shows:\na 4\nb\nit printed:\na 3\nb"), "{told}");
        // Output that the page does not show.
        wrong = sections[0].clone();
        wrong.steps[0].command = "echo loud".to_owned();
        assert!(run(&wrong, &mut Command::new("bash")).is_err());
    }

    #[test]
    fn dots_stand_for_anything_within_a_line_and_alone_for_lines() {
        let all = |expected: &str, lines: &str| {
            let expected: Vec<String> = expected.lines().map(str::to_owned).collect();
            matches(&expected, &lines.lines().collect::<Vec<_>>())
        };
        assert!(all("a …c… e", "a b c d e"));
        assert!(!all("a …c… e", "a b d e"));
        assert!(!all("a…a", "a"));
        assert!(all("…\nb\n…", "a\nb"));
        assert!(!all("b", "a\nb"));
        assert!(!all("…\nc", "a\nb"));
        assert!(all("", ""));
    }
}
