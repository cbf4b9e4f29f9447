//! Tables: columns that know how much they matter.

use crate::harmless;
use comfy_table::{
    Cell, CellAlignment, Color, ColumnConstraint, ContentArrangement, Table as Sheet, TableStyle,
};

/// How a cell is coloured on a terminal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tone {
    /// As it is.
    Plain,
    /// All is well.
    Good,
    /// It changes just now.
    Busy,
    /// Something is wrong.
    Bad,
}

#[derive(Debug, Clone)]
struct Column {
    title: &'static str,
    right: bool,
    /// Columns with a higher number go first where there is no room; 0 stays.
    yields: u8,
}

/// A table.
#[derive(Debug, Default)]
pub struct Table {
    columns: Vec<Column>,
    rows: Vec<Vec<(String, Tone)>>,
    empty: &'static str,
    /// Sentences below the rows.
    notes: Vec<String>,
}

impl Table {
    /// A table that says `empty` where it has no rows.
    pub fn new(empty: &'static str) -> Self {
        Self { empty, ..Self::default() }
    }

    /// A column of texts; it goes before those of lower `yields` where there is no room, and stays if that is 0.
    pub fn text(mut self, title: &'static str, yields: u8) -> Self {
        self.columns.push(Column { title, right: false, yields });
        self
    }

    /// A column of numbers.
    pub fn number(mut self, title: &'static str, yields: u8) -> Self {
        self.columns.push(Column { title, right: true, yields });
        self
    }

    /// A row of plain cells.
    pub fn row<const N: usize>(&mut self, cells: [String; N]) {
        self.toned(cells.map(|cell| (cell, Tone::Plain)));
    }

    /// A row of cells.
    pub fn toned<const N: usize>(&mut self, cells: [(String, Tone); N]) {
        debug_assert_eq!(N, self.columns.len(), "as many cells as columns");
        self.rows.push(cells.map(|(text, tone)| (harmless::text(&text), tone)).into());
    }

    /// A sentence below the rows.
    pub fn note(&mut self, sentence: impl AsRef<str>) {
        self.notes.push(harmless::text(sentence.as_ref()));
    }

    /// The text of the table, and the titles of the columns that had no room. On a terminal it fits the width,
    /// elsewhere it is as wide as it is.
    pub fn render(self, terminal: Option<()>, color: bool) -> (String, Vec<&'static str>) {
        let width = terminal.and_then(|()| Sheet::new().width());
        self.render_within(width, color)
    }

    /// The same for a given width in columns.
    pub fn render_within(mut self, width: Option<u16>, color: bool) -> (String, Vec<&'static str>) {
        if self.rows.is_empty() && !self.empty.is_empty() {
            return (format!("{}\n", self.empty), vec![]);
        }
        let mut hidden = Vec::new();
        if let Some(width) = width {
            while self.natural_width() > usize::from(width) {
                let most = self.columns.iter().map(|column| column.yields).max().unwrap_or(0);
                let Some(at) = self.columns.iter().rposition(|column| column.yields == most && most > 0)
                else {
                    break;
                };
                hidden.push(self.columns.remove(at).title);
                self.rows.iter_mut().for_each(|row| drop(row.remove(at)));
            }
        }
        hidden.reverse();
        let mut sheet = self.sheet(color);
        if let Some(width) = width {
            sheet.set_content_arrangement(ContentArrangement::Dynamic).set_width(width);
            // An id that is cut in two cannot be copied.
            if let Some(column) = sheet.column_mut(0) {
                column.set_constraint(ColumnConstraint::ContentWidth);
            }
        }
        let rows = sheet.lines().map(|line| line.trim_end().to_owned());
        (rows.chain(self.notes).map(|line| line + "\n").collect(), hidden)
    }

    fn natural_width(&self) -> usize {
        let sheet = self.sheet(false);
        sheet
            .column_max_content_widths()
            .iter()
            .map(|width| usize::from(*width) + 2)
            .sum::<usize>()
            .saturating_sub(2)
    }

    fn sheet(&self, color: bool) -> Sheet {
        let mut sheet = Sheet::new();
        sheet.load_style(TableStyle::new());
        sheet.set_content_arrangement(ContentArrangement::Disabled);
        if color {
            sheet.enforce_styling();
        } else {
            sheet.force_no_tty();
        }
        sheet.set_header(self.columns.iter().map(|column| Cell::new(column.title)));
        for row in &self.rows {
            sheet.add_row(row.iter().map(|(text, tone)| {
                let cell = Cell::new(text);
                match tone {
                    Tone::Plain => cell,
                    Tone::Good => cell.fg(Color::Green),
                    Tone::Busy => cell.fg(Color::Yellow),
                    Tone::Bad => cell.fg(Color::Red),
                }
            }));
        }
        for (at, column) in self.columns.iter().enumerate() {
            if let Some(made) = sheet.column_mut(at) {
                made.set_padding((0, 2));
                if column.right {
                    made.set_cell_alignment(CellAlignment::Right);
                }
            }
        }
        sheet
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table() -> Table {
        let mut table = Table::new("No cats.").text("NAME", 0).text("COLOUR", 2).number("LIVES", 1);
        table.row(["Tom".into(), "grey".into(), "9".into()]);
        table.row(["Felix\u{1b}[2J".into(), "black".into(), "10".into()]);
        table
    }

    #[test]
    fn a_wide_table_is_aligned_and_harmless() {
        let (text, hidden) = table().render_within(None, false);
        assert_eq!(
            text,
            "NAME            COLOUR  LIVES\n\
             Tom             grey        9\n\
             Felix\\u{1b}[2J  black      10\n"
        );
        assert!(hidden.is_empty());
    }

    #[test]
    fn a_narrow_terminal_loses_the_columns_that_matter_least() {
        let (text, hidden) = table().render_within(Some(24), false);
        assert_eq!(hidden, ["COLOUR"]);
        assert!(text.lines().all(|line| line.len() <= 24), "{text}");
    }

    #[test]
    fn an_empty_table_says_so() {
        assert_eq!(Table::new("No cats.").text("NAME", 0).render_within(None, false).0, "No cats.\n");
    }
}
