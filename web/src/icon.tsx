// Pictures on buttons, drawn since fonts lack characters. They take the text's colour; the button's label says the same.

const PATHS = {
  menu: "M2.5 4h11M2.5 8h11M2.5 12h11",
  settings: "M2.5 5H8M12 5h1.5M2.5 11H4M8 11h5.5M12 5a2 2 0 1 1-4 0 2 2 0 1 1 4 0zM8 11a2 2 0 1 1-4 0 2 2 0 1 1 4 0z",
  close: "M4 4l8 8M12 4l-8 8",
  rename: "M10.5 3L13 5.5 5.5 13l-3 .5.5-3zM9 4.5L11.5 7",
  delete: "M3 4.5h10M6.5 4.5v-2h3v2M4.5 4.5l.5 9h6l.5-9M6.9 7v4M9.1 7v4",
  attach: "M13 7.5l-5 5a2.9 2.9 0 0 1-4.1-4.1l5.3-5.3a1.95 1.95 0 0 1 2.8 2.8l-5.3 5.2a1 1 0 0 1-1.4-1.4L10 5.1",
  download: "M8 2.5V10M4.8 7L8 10.2 11.2 7M3 13.2h10",
};

export function Icon({ name }: { name: keyof typeof PATHS }) {
  return (
    <svg
      viewBox="0 0 16 16"
      width="16"
      height="16"
      fill="none"
      stroke="currentColor"
      stroke-width="1.5"
      stroke-linecap="round"
      stroke-linejoin="round"
      aria-hidden="true"
    >
      <path d={PATHS[name]} />
    </svg>
  );
}
